"""Sampling from p(x0 | y), the images that fit a linear measurement y = A x0 + n, with an unconditional denoiser.

Each method is a sampler around another sampler, the solver. The solver makes the steps; the method changes the images
between them, or the predictions that the solver gets. No network is trained for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from src.errors import UserError

from .denoiser import BaseDenoiser, WrappedDenoiser, Wrapper, wrapped
from .forward import diffuse
from .measurement import Blur, Downsample, Mask, Measurement, Operator
from .noise_level import NoiseLevel, conditional_variance
from .parameterization import Prediction
from .sampler.base import Path, Sampler, State, check_memoryless, weighted_sum
from .sampler.noise import NoiseSource


class Restoration(Sampler):
    """Samples images that fit a measurement.

    Args:
        solver: the sampler that makes the steps.
        measurement: the measurement of the images of the batch.

    Attributes:
        operators: the kinds of operator that the method supports.
        inside_clipping: whether the method changes unclipped predictions; it then takes the clipping as `outer`.
    """

    operators: tuple[type[Operator], ...] = (Mask, Blur, Downsample)
    inside_clipping: bool = False

    def __init__(self, solver: Sampler, measurement: Measurement):
        self.solver, self.measurement = solver, measurement

    @property
    def memory(self) -> int:
        return self.solver.memory


class Replacement(Restoration):
    """After each step, the known pixels are replaced by noisy ones of the same level (Song et al. 2021,
    arXiv:2011.13456, appendix I.2; Lugmayr et al. 2022, arXiv:2201.09865, eq. 8).

        x_s <- known (alpha_s y + sigma_s z) + (1 - known) x_s

    The solver sees the known pixels only as noisy as the rest, so the filled pixels may not fit them; `RePaint`
    reduces this error. At the step to clean data the known pixels become exactly y.

    Raises:
        ValueError: the solver is a multi-step method, whose earlier steps had other known pixels.
    """

    operators = (Mask,)

    def __init__(self, solver: Sampler, measurement: Measurement):
        super().__init__(check_memoryless(solver, "sampler"), measurement)

    def step(self, denoiser, x_t, t, s, noise, path):
        if path.index == 0:
            x_t = self._replaced(x_t, t, noise)
        return self._step(denoiser, x_t, t, s, noise, path)

    def _step(
        self,
        denoiser: BaseDenoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        noise: NoiseSource,
        path: Path,
    ) -> State:
        state = self.solver.step(denoiser, x_t, t, s, noise, path)
        return state._replace(x=self._replaced(state.x, s, noise))

    def _replaced(self, x: Tensor, level: NoiseLevel, noise: NoiseSource) -> Tensor:
        y = self.measurement.y
        return torch.where(
            self.measurement.operator.known, diffuse(y, noise(y), level) if level.sigma else y, x
        )


class RePaint(Replacement):
    """Replacement with resampling (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1 and section 4.2).

    At every `jump_length`-th level, forward noise raises the images by `jump_length` levels and the same steps lead
    back, n_resample - 1 times, so that the filled pixels are made again beside the known ones. The jump is one
    draw of q(x_t | x_s), which has the distribution of the paper's sequence of single steps.

    Args:
        solver: a single-step sampler; ancestral DDPM in the paper.
        measurement: of known pixels.
        jump_length: j, number of levels of a jump; None for 10, or half of the steps if that is less.
        n_resample: r, how often each stretch is sampled; 1 is `Replacement`.

    Raises:
        ValueError: a number is below 1, or the solver is a multi-step method.
        UserError: when sampling, there are not more steps than jump_length.
    """

    def __init__(
        self, solver: Sampler, measurement: Measurement, jump_length: int | None = None, n_resample: int = 10
    ):
        super().__init__(solver, measurement)
        for name, value in (("jump_length", jump_length), ("n_resample", n_resample)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.jump_length, self.n_resample = jump_length, n_resample

    def step(self, denoiser, x_t, t, s, noise, path):
        length = jump_of(self.jump_length, path.steps)
        state = super().step(denoiser, x_t, t, s, noise, path)
        left = path.remaining - 2  # steps to the last noisy level, from which no jump leads
        if left < 0 or left % length or left >= path.steps - length:
            return state
        top, bottom = path.index + 1 - length, path.index + 1
        ratio = path.levels[top].alpha / s.alpha
        std = conditional_variance(path.levels[top], s) ** 0.5
        for _ in range(self.n_resample - 1):
            x = weighted_sum((ratio, state.x), (std, noise(state.x)))
            for index in range(top, bottom):
                high, low = path.levels[index : index + 2]
                state = self._step(denoiser, x, high, low, noise, replace(path, index=index))
                x = state.x
        return state


def jump_of(length: int | None, steps: int) -> int:
    """The levels of a jump of `RePaint` with this number of steps; see its `jump_length`.

    Raises:
        UserError: there are not more steps than levels.
    """
    if steps < 2:
        raise UserError(
            f"sampler.steps={steps}: RePaint needs at least 2 steps; choose more, or restoration=replacement"
        )
    if length is None:
        return min(10, steps // 2)
    if length >= steps:
        raise UserError(
            f"restoration.jump_length={length}: a jump needs more than {length} steps, and sampler.steps={steps};"
            f" choose restoration=repaint restoration.jump_length={min(10, steps // 2)}, or more sampler.steps"
        )
    return length


class DPS(Restoration):
    """Diffusion posterior sampling (Chung et al. 2023, arXiv:2209.14687, algorithm 1).

        x_s <- x_s - scale d/dx_t |y - A x0_hat(x_t)|

    The gradient is taken through the network, at the solver's first evaluation. The paper's step zeta' / |r| on the
    squared norm |r|^2 is scale = 2 zeta'; its code takes the gradient of the norm as here, with scale 0.3 to 1 and
    1,000 steps of DDPM. The best scale depends on the number of steps.

    Args:
        solver: a single-step sampler; ancestral DDPM in the paper.
        measurement: any operator.
        scale: step size, at least 0.

    Raises:
        ValueError: scale is negative, or the solver is a multi-step method.
    """

    def __init__(self, solver: Sampler, measurement: Measurement, scale: float = 1.0):
        super().__init__(check_memoryless(solver, "sampler"), measurement)
        if scale < 0:
            raise ValueError(f"scale must be at least 0, got {scale}")
        self.scale = scale

    def step(self, denoiser, x_t, t, s, noise, path):
        gradient = None

        def remembered(x: Tensor, level: NoiseLevel) -> Prediction:
            nonlocal gradient
            if gradient is not None:
                return denoiser(x, level)
            prediction, gradient = with_gradient(denoiser, x, level, self._cotangent)
            return prediction

        state = self.solver.step(_Changed(denoiser, remembered), x_t, t, s, noise, path)
        return state._replace(x=state.x.sub(gradient, alpha=self.scale))

    def _cotangent(self, x0: Tensor) -> Tensor:
        """The gradient of |y - A x0| in x0."""
        residual = self.measurement.residual(x0)
        norm = torch.linalg.vector_norm(residual, dim=(1, 2, 3), keepdim=True)
        return -self.measurement.operator.adjoint(residual / norm.clamp(min=torch.finfo(norm.dtype).tiny))


class PiGDM(Restoration):
    """Pseudoinverse-guided diffusion (Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems",
    ICLR, section 3): the score of the posterior, with a Gaussian approximation of p(x0 | x_t).

        p(x0 | x_t) ~ N(x0_hat, r_t^2 I),    r_t^2 = v sigma_t^2 / (alpha_t^2 v + sigma_t^2),    v = data_std^2
        x0 <- x0_hat + sigma_t^2/alpha_t (d x0_hat/d x_t)^T A^T (r_t^2 A A^T + noise^2 I)^-1 (y - A x0_hat)

    This is exact where the data are Gaussian with variance v in every pixel. The score is used as it is, without the
    weight that algorithm 1 of the paper gives the guidance. At a level without signal (alpha = 0) x0_hat
    does not depend on x_t, and the prediction stays unguided.

    Args:
        solver: any sampler.
        measurement: any operator; a blur needs noise above 0.
        data_std: standard deviation of a pixel of the data; 1 in the paper.
        outer: wrappers of the guided denoiser, e.g. clipping. Inside the guidance, clipping would stop the gradient at
            every clipped pixel, and leave the guided x0 unbounded.

    Raises:
        ValueError: data_std is not positive.
    """

    inside_clipping = True

    def __init__(
        self,
        solver: Sampler,
        measurement: Measurement,
        data_std: float = 1.0,
        outer: Sequence[Wrapper] = (),
    ):
        super().__init__(solver, measurement)
        if data_std <= 0:
            raise ValueError(f"data_std must be positive, got {data_std}")
        self.data_std, self.outer = data_std, outer

    def step(self, denoiser, x_t, t, s, noise, path):
        def guided(x: Tensor, level: NoiseLevel) -> Prediction:
            if level.alpha == 0:
                return denoiser(x, level)
            v, of_signal, of_noise = self.data_std**2, level.alpha**2, level.sigma**2
            spread = v * of_noise / (of_signal * v + of_noise)
            measured = self.measurement

            def cotangent(x0: Tensor) -> Tensor:
                solved = measured.operator.solve(measured.residual(x0), spread, measured.noise**2)
                return measured.operator.adjoint(solved)

            prediction, gradient = with_gradient(denoiser, x, level, cotangent)
            return prediction.with_x0(prediction.x0.add(gradient, alpha=of_noise / level.alpha))

        return self.solver.step(wrapped(_Changed(denoiser, guided), self.outer), x_t, t, s, noise, path)


class DDNM(Restoration):
    """Denoising diffusion null-space model (Wang et al. 2023, arXiv:2212.00490, algorithm 1): the measured part of x0
    is replaced.

        x0 <- x0_hat + A^+ (y - A x0_hat)

    For measurements without noise. Every image fits the measurement exactly, up to rounding. It needs no gradient.
    """

    operators = (Mask, Downsample)

    def step(self, denoiser, x_t, t, s, noise, path):
        def corrected(x: Tensor, level: NoiseLevel) -> Prediction:
            prediction = denoiser(x, level)
            x0, measured = prediction.x0, self.measurement
            return prediction.with_x0(x0 + measured.operator.pseudo_inverse(measured.residual(x0)))

        return self.solver.step(_Changed(denoiser, corrected), x_t, t, s, noise, path)


class _Changed(WrappedDenoiser):
    """A denoiser whose predictions come from a function of x_t and its level."""

    def __init__(self, inner: BaseDenoiser, predict: Callable[[Tensor, NoiseLevel], Prediction]):
        super().__init__(inner)
        self.predict = predict

    def forward(self, x_t, level, condition=None, to=None):
        return self.predict(x_t, level)


def with_gradient(
    denoiser: BaseDenoiser, x_t: Tensor, level: NoiseLevel, cotangent: Callable[[Tensor], Tensor]
) -> tuple[Prediction, Tensor]:
    """The prediction at x_t, and (d x0_hat/d x_t)^T v, both without a graph.

    Args:
        denoiser: differentiable, with a fixed condition.
        x_t: shape (B, C, H, W).
        level: of x_t.
        cotangent: maps x0_hat to v, of the same shape; not differentiated.
    """
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        prediction = denoiser(x, level)
        x0 = prediction.x0
        with torch.no_grad():
            v = cotangent(x0)
        (gradient,) = torch.autograd.grad(x0, x, v)
    return prediction.detach(), gradient
