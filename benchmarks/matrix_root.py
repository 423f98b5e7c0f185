"""Seconds of the matrix root of a Fréchet distance at 2,048 features, beside torch-fidelity's and scipy's.

    OMP_NUM_THREADS=1 python -m benchmarks.matrix_root [--rounds 3] [--json FILE]

Two sets of rectified Gaussian features. torch-fidelity's `fid_statistics_to_metric` takes the eigenvalues of
C_a C_b, which is not symmetric (numpy); the first FID code and its ports take scipy's `sqrtm` of it. Ours decomposes
the reference once (`Target.of`), and then computes each distance in two ways that must agree (`compare`); the part of
a distance that one way alone needs is listed, too. The last rows are cheaper checks than the singular values, with how
far their distance is from them: eigenvalues of another factorisation, and an iteration of matrix products.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy.linalg import sqrtm
from torch.linalg import matrix_norm
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from benchmarks.report import machine, spread, write_json
from src.metrics.frechet import Moments, Target, cholesky, compare

FEATURES = 2048


def moments(n: int, seed: int) -> Moments:
    """Of n rectified features with correlations."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(0)) / FEATURES**0.5
    x = torch.randn(n, FEATURES, generator=generator) @ mixing
    return Moments(x.relu_().double().mean(0), torch.cov(x.T.double()))


def by_eigenvalues(a: Moments, target: Target) -> float:
    """The distance by the symmetric product alone."""
    product = target.factor.T @ a.covariance @ target.factor
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum().item()
    return distance_with(cross, a, target.moments)


def distance_with(cross: float, a: Moments, b: Moments) -> float:
    """The distance with this trace of the root of C_a C_b."""
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces - 2 * cross).item()


def by_other_eigenvalues(a: Moments, b: Moments) -> float:
    """The distance by the eigenvalues of L_a^T C_b L_a."""
    factor = cholesky(a.covariance)
    values = torch.linalg.eigvalsh(factor.T @ b.covariance @ factor)
    return distance_with(values.clamp(min=0).sqrt().sum().item(), a, b)


def by_products(a: Moments, target: Target, tolerance: float = 1e-11) -> float:
    """The distance by Newton and Schulz' iteration for the polar factor of L_a^T L_b, until its trace stands still."""
    x = cholesky(a.covariance).T @ target.cholesky
    polar, before, cross = x / (matrix_norm(x, 1) * matrix_norm(x, math.inf)).sqrt(), -1.0, 0.0
    while abs(cross - before) > tolerance * abs(cross):
        before = cross
        polar = 1.5 * polar - 0.5 * (polar @ (polar.T @ polar))
        cross = (polar * x).sum().item()
    return distance_with(cross, a, target.moments)


def by_sqrtm(a: Moments, b: Moments) -> float:
    """The distance by scipy's root."""
    return distance_with(sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real.trace(), a, b)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without", nargs="*", default=[], help="rows that are left out, e.g. sqrtm")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    a, b = (moments(arguments.images, seed) for seed in (1, 2))
    target = Target.of(b)
    statistics = [{"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in (a, b)]
    rows: dict[str, Callable[[], float]] = {
        "torch-fidelity (eigvals)": lambda: fid_statistics_to_metric(*statistics, False)[KEY_METRIC_FID],
        "sqrtm (scipy)": lambda: by_sqrtm(a, b),
        "ours, decomposing the reference": lambda: Target.of(b) and float("nan"),
        "ours, a distance (two ways)": lambda: compare(a, target).distance,
        "ours, a distance with an interval": lambda: compare(a, target, directions=True).distance,
        "ours, eigenvalues alone": lambda: by_eigenvalues(a, target),
        "check by other eigenvalues": lambda: by_other_eigenvalues(a, b),
        "check by matrix products": lambda: by_products(a, target),
    }
    rows = {name: run for name, run in rows.items() if not any(word in name for word in arguments.without)}
    exact = compare(a, target).distance
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    values = {}
    for _ in range(arguments.rounds):
        for name, run in rows.items():
            start = time.perf_counter()
            values[name] = run()
            seconds[name].append(time.perf_counter() - start)
    table = Table(
        "",
        "s",
        "spread",
        "distance",
        "from the singular values",
        title=f"{FEATURES} features; {machine()['text']}",
    )
    for name, times in seconds.items():
        each = spread(times)
        deviation = values[name] / exact - 1
        table.add_row(name, f"{each['median']:.2f}", each["text"], f"{values[name]:.10g}", f"{deviation:.1e}")
    Console(width=120).print(table)
    write_json(arguments.json, {"seconds": seconds, "distances": values})


if __name__ == "__main__":
    main()
