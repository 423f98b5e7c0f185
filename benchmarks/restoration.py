"""Distance of the restoration methods from the exact posterior, on a mixture of Gaussians in the plane.

    python -m benchmarks.restoration

The first number of x0 is known to be -0.25, between two of the three components. The second number of the samples is
compared with exact samples of p(x0 | y): their Wasserstein distance of order 1 and the weight of the component above.
The denoiser is exact, so all errors are the method's. docs/editing.md has the table.
"""

import torch

from src.diffusion.measurement import Mask, Measurement
from src.diffusion.restoration import DDNM, DPS, PiGDM, RePaint, Replacement, Restoration
from src.diffusion.sampler import DDPM
from src.diffusion.schedule import Cosine
from src.diffusion.spacing import Trailing
from tests.diffusion.mixture import MixtureDenoiser, Posterior, three_modes

SAMPLES = 10_000
KNOWN = -0.25
METHODS = (
    (Replacement, 50, {}),
    *((RePaint, 50, {"jump_length": j, "n_resample": r}) for j in (1, 10) for r in (2, 5, 10, 30)),
    (DDNM, 50, {}),
    *((PiGDM, 50, {"data_std": std}) for std in (1.0, 0.3)),
    *((DPS, steps, {"scale": scale}) for steps in (50, 500) for scale in (0.03, 0.1, 0.3, 1.0)),
)


def sampled(method: type[Restoration], steps: int, numbers: dict) -> torch.Tensor:
    """Samples of p(x0 | y) by a method around DDPM, shape (SAMPLES, 2)."""
    schedule = Cosine()
    y = torch.zeros(SAMPLES, 1, 1, 2, dtype=torch.float64)
    y[..., 0] = KNOWN
    source = torch.Generator().manual_seed(1)

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=source)

    measurement = Measurement(Mask(torch.tensor([True, False]).view(1, 1, 1, 2)), y)
    denoiser = MixtureDenoiser(three_modes(), schedule)
    sampler = method(DDPM(), measurement, **numbers)
    return sampler(denoiser, noise(y), Trailing()(schedule, steps), None, noise).flatten(1)


def main() -> None:
    torch.set_num_threads(1)
    matrix, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([KNOWN], dtype=torch.float64)
    posterior = Posterior(three_modes(), matrix, y)
    source = torch.Generator().manual_seed(2)
    exact, other = (posterior.sample(SAMPLES, source)[:, 0, 0, 1] for _ in range(2))
    print("| method | steps | W1 | weight above | misfit |\n| --- | --- | --- | --- | --- |")
    print(f"| exact | | {_distance(other, exact):.3f} | {posterior.weights[1]:.3f} | 0 |")
    for method, steps, numbers in METHODS:
        first, second = sampled(method, steps, numbers).T
        name = ", ".join([method.__name__, *(f"{name} {value:g}" for name, value in numbers.items())])
        share, misfit = (second > -0.15).double().mean(), (first - KNOWN).square().mean().sqrt()
        print(
            f"| {name} | {steps} | {_distance(second, exact):.3f} | {share:.3f} | {misfit:.3f} |", flush=True
        )


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.sort().values - b.sort().values).abs().mean().item()


if __name__ == "__main__":
    main()
