"""The order of convergence of every deterministic sampler, measured on data whose exact denoiser is known.

    python -m benchmarks.sampler_orders [--markdown] [--plot docs/sampler_orders.png]

The range from ln(alpha/sigma) = -3 to 1 is sampled in 40 to 320 even steps in float64, for a mixture of three
Gaussians in the plane. The error is the root mean square distance to the result of an adaptive solver at tolerance
1e-12. The order is minus the slope of a line fitted to ln(error) over ln(steps).
"""

import argparse
import math
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from src.diffusion.sampler import (
    DDIM,
    DEIS,
    DPM2,
    LMS,
    PLMS,
    Dopri5,
    Euler,
    Heun,
    MultistepDPMSolver,
    Sampler,
    SinglestepDPMSolver,
    UniPC,
)
from src.diffusion.schedule import EDM, Cosine, Linear, RectifiedFlow, Schedule
from tests.diffusion.mixture import MixtureDenoiser, three_modes

LOG_SNR = (-3.0, 1.0)
STEPS = (40, 80, 160, 320)
IMAGES = 32
SCHEDULES = {
    "VP linear": Linear(),
    "VP cosine": Cosine(),
    "EDM": EDM(),
    "rectified flow": RectifiedFlow(),
}


@dataclass(frozen=True)
class Solver:
    """A sampler and its theoretical order."""

    name: str
    sampler: Sampler
    order: int


# lower_order_final is for trajectories that end at clean data, which these do not
SOLVERS = [
    Solver("DDIM", DDIM(), 1),
    Solver("Euler", Euler(), 1),
    Solver("Heun", Heun(), 2),
    Solver("DPM2", DPM2(), 2),
    Solver("DPM-Solver-2", SinglestepDPMSolver(2, plus_plus=False), 2),
    Solver("DPM-Solver-3", SinglestepDPMSolver(3, plus_plus=False), 3),
    Solver("DPM-Solver++(2S)", SinglestepDPMSolver(2), 2),
    Solver("DPM-Solver++(3S)", SinglestepDPMSolver(3), 3),
    Solver("DPM-Solver++(1M)", MultistepDPMSolver(1, lower_order_final=False), 1),
    Solver("DPM-Solver++(2M)", MultistepDPMSolver(2, lower_order_final=False), 2),
    Solver("DPM-Solver++(3M)", MultistepDPMSolver(3, lower_order_final=False), 3),
    Solver(
        "DPM-Solver++(3M), half curvature",
        MultistepDPMSolver(3, lower_order_final=False, half_curvature=True),
        2,
    ),
    Solver("DPM-Solver multi-step 2", MultistepDPMSolver(2, plus_plus=False, lower_order_final=False), 2),
    Solver("DPM-Solver multi-step 3", MultistepDPMSolver(3, plus_plus=False, lower_order_final=False), 3),
    *(
        Solver(f"UniPC-{p}, bh{bh}", UniPC(p, bh, lower_order_final=False), p + 1)
        for p in (1, 2, 3)
        for bh in (1, 2)
    ),
    *(Solver(f"DEIS {p}", DEIS(p), p) for p in (1, 2, 3, 4)),
    *(Solver(f"LMS {p}", LMS(p), p) for p in (1, 2, 3, 4)),
    Solver("PLMS", PLMS(), 2),
    Solver("PNDM (Runge-Kutta start)", PLMS(runge_kutta=True), 2),
]


@dataclass(frozen=True)
class Measured:
    """The measurement of a solver on one schedule.

    Attributes:
        evaluations: of the denoiser, for each number of steps.
        errors: for each number of steps.
    """

    evaluations: list[int]
    errors: list[float]

    @property
    def order(self) -> float:
        """Minus the slope of ln(error) over ln(steps), by least squares."""
        x = torch.tensor(STEPS, dtype=torch.float64).log()
        y = torch.tensor(self.errors, dtype=torch.float64).log()
        return -((x - x.mean()) * (y - y.mean())).sum().item() / (x - x.mean()).square().sum().item()


class Problem:
    """The range on one schedule, with its start and exact end."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.denoiser = MixtureDenoiser(three_modes(), schedule)
        start = schedule(self.times(1)[:1]).scalars()[0]
        noise = torch.randn(IMAGES, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        # the same point of the unscaled plane on every schedule
        self.x_t = start.alpha * math.sqrt(1 + math.exp(-2 * LOG_SNR[0])) * noise
        self.end = Dopri5(1e-12)(self.denoiser, self.x_t, self.times(1))

    def times(self, steps: int) -> Tensor:
        """Even in log-SNR."""
        return self.schedule.time_of_log_snr(torch.linspace(*LOG_SNR, steps + 1, dtype=torch.float64))

    def solve(self, sampler: Sampler, steps: int) -> tuple[int, float]:
        """The number of evaluations and the error."""
        for state in sampler.trajectory(self.denoiser, self.x_t, self.times(steps)):
            last = state
        return last.evaluations, (last.x - self.end).square().mean().sqrt().item()

    def measure(self, sampler: Sampler) -> Measured:
        """The measurement over all numbers of steps."""
        evaluations, errors = zip(*(self.solve(sampler, steps) for steps in STEPS), strict=True)
        return Measured(list(evaluations), list(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--plot", help="where to save the plot of error against evaluations")
    arguments = parser.parse_args()
    problems = {name: Problem(schedule) for name, schedule in SCHEDULES.items()}
    rows = {
        solver.name: {name: problem.measure(solver.sampler) for name, problem in problems.items()}
        for solver in track(SOLVERS, description="solvers", transient=True)
    }
    header = ["solver", "theory", *SCHEDULES, f"error at {STEPS[0]} steps", "evaluations"]
    table = [
        [
            solver.name,
            str(solver.order),
            *(f"{measured.order:.2f}" for measured in rows[solver.name].values()),
            f"{rows[solver.name]['VP linear'].errors[0]:.1e}",
            str(rows[solver.name]["VP linear"].evaluations[0]),
        ]
        for solver in SOLVERS
    ]
    if arguments.markdown:
        for cells in [header, ["---"] * len(header), *table]:
            print("| " + " | ".join(cells) + " |")
    else:
        shown = Table(*header, title="measured order of convergence")
        for cells in table:
            shown.add_row(*cells)
        Console(width=140).print(shown)
    if arguments.plot:
        plot({name: row["VP linear"] for name, row in rows.items()}, arguments.plot)


def plot(measured: dict[str, Measured], path: str) -> None:
    """Plots the error against evaluations, one line per solver."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [
        "DDIM",
        "Heun",
        "DPM-Solver-3",
        "DPM-Solver++(2M)",
        "DPM-Solver++(3M)",
        "UniPC-2, bh2",
        "UniPC-3, bh2",
        "DEIS 3",
        "LMS 4",
        "PLMS",
    ]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), dpi=100)
    for name in names:
        axes.loglog(measured[name].evaluations, measured[name].errors, marker=".", label=name)
    axes.set(xlabel="network evaluations", ylabel="error (RMS)", title="VP linear, exact denoiser")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
