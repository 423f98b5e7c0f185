"""The probability-flow ODE with control of the error."""

import math

from src.errors import UserError

from ..noise_level import as_times
from ..ode import NotFinite, integrate
from .base import Sampler, State, level_at, not_finite


class Dopri5(Sampler):
    """Dormand and Prince's method of order 5 with adaptive steps on the probability-flow ODE (Song et al. 2021).

    In the angle phi = arctan(sigma/alpha), with x/r for r^2 = alpha^2 + sigma^2, the ODE is regular from pure
    noise to clean data on every schedule:

        d(x/r)/d phi = cos(phi) eps - sin(phi) x0

    Between two times of the spacing the solver chooses its own steps, so that one time is enough; the
    last stretch ends at the schedule's t_min, where the estimate of x0 is taken. The steps are common to a batch:
    images of other batches agree to the tolerance. Evaluations are counted in `State.evaluations`.

    Args:
        tolerance: bound of each step's error per image (root mean square), relative and absolute.
        max_evaluations: of the denoiser in one stretch.

    Raises:
        ValueError: a number is not positive.
        UserError: when sampling, it cannot be reached, or the network's output is not finite.
    """

    def __init__(self, tolerance: float = 1e-5, max_evaluations: int = 10_000):
        for name, value in (("tolerance", tolerance), ("max_evaluations", max_evaluations)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.tolerance, self.max_evaluations = tolerance, max_evaluations

    def step(self, denoiser, x_t, t, s, noise, path):
        schedule = denoiser.schedule
        end = s if s.sigma > 0 else schedule([schedule.t_min]).scalars()[0]
        start, stop = (math.atan2(level.sigma, level.alpha) for level in (t, end))

        first = None  # prediction: the one at x_t, where the integration begins

        def derivative(turned, y):
            nonlocal first
            phi = start - turned
            level = level_at(schedule, -math.log(math.tan(phi)))
            prediction = denoiser(y[0] * math.hypot(level.alpha, level.sigma), level)
            first = first or prediction
            return (prediction.mix(math.sin(phi), -math.cos(phi)),)

        y = (x_t / math.hypot(t.alpha, t.sigma),)
        if stop < start:
            try:
                y, _ = integrate(derivative, y, 0.0, start - stop, self.tolerance, self.max_evaluations)
            except NotFinite as error:
                log_snr = -math.log(math.tan(start - error.x))
                time = schedule.time_of_log_snr(as_times([log_snr])).item()
                step = f"step {path.index + 1} of {path.steps}"
                raise not_finite("sampling: the images", step, time) from None
            except ValueError as error:
                raise UserError(f"sampler.{error}") from None
        x = y[0] * math.hypot(end.alpha, end.sigma)
        if s.sigma > 0:
            return State(x, first)
        prediction = denoiser(x, end)
        return State(prediction.x0, prediction)
