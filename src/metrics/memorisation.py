"""Nearest neighbours of generated images, and tests of whether they copy the training images."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from tqdm import tqdm

Vectors = NDArray[np.floating]

CHUNK = 500
"""Queries that are compared with all points at once."""


class Neighbours(NamedTuple):
    """Nearest neighbours, the nearest first.

    Attributes:
        distances: Euclidean, float64, shape (n, k).
        indices: of the points, int64, shape (n, k).
    """

    distances: NDArray[np.float64]
    indices: NDArray[np.int64]


def nearest(queries: Vectors, points: Vectors, k: int = 1) -> Neighbours:
    """The k nearest points of each query, by exhaustive search.

    Args:
        queries: shape (n, d).
        points: shape (m, d), m >= 1.
        k: limited to m.
    """
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(k, len(points)), algorithm="brute").fit(points)
    found: list[Neighbours] = []
    chunks = [queries[first : first + CHUNK] for first in range(0, len(queries), CHUNK)]
    for chunk in tqdm(chunks, desc="nearest neighbours", delay=2, leave=False):
        indices = search.kneighbors(chunk, return_distance=False)
        # scikit-learn's distances come from a product of matrices, whose rounding hides exact copies
        differences = points[indices].astype(np.float64) - chunk[:, None]
        distances = np.sqrt((differences**2).sum(axis=2))
        order = distances.argsort(axis=1, kind="stable")
        found.append(
            Neighbours(np.take_along_axis(distances, order, 1), np.take_along_axis(indices, order, 1))
        )
    return Neighbours(*map(np.concatenate, zip(*found, strict=True)))


def copy_ratio(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance to the nearest training image, relative to the mean distance to the next ones; shape (n,).

    Small for copies, near 1 for other images. With one further neighbour this is the criterion of Yoon et al. 2023
    ("Diffusion probabilistic models generalize when they fail to memorize"), where an image counts as memorised below
    1/3; with more it is that of Carlini et al. 2023 (arXiv:2301.13188, sec. 4.2). Training images must be distinct:
    with a duplicated image among them both distances are equal, and its copies would be missed.

    Args:
        distances: of `nearest` with k >= 2, shape (n, k).
    """
    others = distances[:, 1:].mean(axis=1)
    return np.divide(distances[:, 0], others, out=np.zeros(len(distances)), where=others > 0)


def attraction(ratios: NDArray[np.float64], indices: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """How strongly generated images are drawn to each training image; shape (count,).

    The sum of 1 - ratio over the generated images that are nearest to it. It finds training images that are repeated in
    the data, also where no generated image is near enough to be a copy.

    Args:
        ratios: `copy_ratio` of the generated images, shape (n,).
        indices: of their nearest training images, shape (n,).
        count: number of training images.
    """
    return np.bincount(indices, np.maximum(1 - ratios, 0), minlength=count)


@dataclass(frozen=True)
class TestResult:
    """A one-sided test.

    Attributes:
        z: statistic, standard normal without copying.
        p: probability of a statistic at least as extreme without copying.
    """

    __test__ = False  # not a test of pytest

    z: float
    p: float


def copying_test(
    of_generated: Vectors,
    of_held_out: Vectors,
    generated_cells: NDArray,
    held_out_cells: NDArray,
    least: int = 5,
) -> tuple[float, TestResult]:
    """The data-copying test of Meehan, Chaudhuri & Dasgupta 2020 (arXiv:2004.05675).

    In each cell of a partition of the space, distances to the nearest training image are compared between generated
    and held-out images by the Mann-Whitney statistic Z (with a correction for ties), and

        C_T = sum_cells share(cell) Z(cell),    share: of the held-out images

    is negative where generated images are nearer to the training images than held-out ones. If they are fresh draws
    from the distribution of the data, the Z are independent with mean 0 and variance 1, whatever the training images
    and the partition, and z = C_T / sqrt(sum share^2) is standard normal. Images that are only more typical than those
    of the data, e.g. smoother, lower C_T as well.

    Args:
        of_generated, of_held_out: distances to the nearest training image, shapes (n,) and (m,).
        generated_cells, held_out_cells: number of the cell of each image.
        least: cells with fewer generated or held-out images are left out.

    Returns:
        C_T, and z with its lower p value; NaN where no cell has enough images.
    """
    statistics, shares = [], []
    for cell in np.unique(held_out_cells):
        x, y = of_generated[generated_cells == cell], of_held_out[held_out_cells == cell]
        if min(len(x), len(y)) < least:
            continue
        ranks = rankdata(np.concatenate([x, y]))
        # the variance of the sum of ranks without replacement; includes ties
        variance = len(x) * len(y) / len(ranks) * ranks.var(ddof=1)
        if variance > 0:
            statistics.append((ranks[: len(x)].sum() - len(x) * ranks.mean()) / variance**0.5)
            shares.append(len(y))
    if not shares:
        return float("nan"), TestResult(float("nan"), float("nan"))
    share = np.array(shares) / sum(shares)
    statistic = float(share @ statistics)
    z = statistic / float((share**2).sum() ** 0.5)
    return statistic, TestResult(z, float(norm.cdf(z)))


def membership_test(
    neighbours: NDArray[np.int64], trained: NDArray[np.bool_], occurrences: NDArray[np.int64]
) -> TestResult:
    """Are generated images nearest to training images more often than chance allows?

    The nearest image of each generated one is looked for among training and held-out images together. If the generated
    images depend on the training images only through the distribution of the data, which images were trained on is a
    random choice, also given the generated images. So the number of generated images whose nearest image was trained
    on is the sum of the counts of a random sample of the images, without replacement. Its mean and variance are exact,
    and its distribution is nearly normal. Unlike distances, this does not depend on how good or how typical the
    generated images are.

    Of the images that are in one of the sets only, those that occur twice are training images more often than those
    that occur once, if the training set is the larger one. So the sample is drawn among images that occur equally
    often. Images of which none is held out (e.g. training images that were repeated on purpose) count as occurring
    once.

    Args:
        neighbours: index of the nearest of the images, shape (n,).
        trained: whether each image is a training image, shape (m,); the images are distinct, see `in_one_set`.
        occurrences: how often each is in its set, shape (m,).

    Returns:
        z, positive if training images are nearest too often, with its upper p value; NaN if no images of one group are
        in both sets.
    """
    counts = np.bincount(neighbours, minlength=len(trained)).astype(float)
    occurrences = np.where(np.isin(occurrences, occurrences[~trained]), occurrences, 1)
    excess = variance = 0.0
    for number in np.unique(occurrences):
        found, seen = counts[occurrences == number], trained[occurrences == number]
        train, held_out = seen.sum(), (~seen).sum()
        if train and held_out:
            excess += found[seen].sum() - train * found.mean()
            variance += train * held_out / len(found) * found.var(ddof=1)
    z = float(excess / variance**0.5) if variance else float("nan")
    return TestResult(z, float(norm.sf(z)))


def distinct(images: NDArray) -> NDArray[np.int64]:
    """Indices of the first of each set of equal images, increasing; images of any shape (n, ...)."""
    return np.sort(np.unique(_rows(images), return_index=True)[1])


def in_one_set(train: NDArray, held_out: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct images that are in one of two sets only, of any equal shapes (n, ...).

    Returns:
        Indices in the concatenated sets, increasing, of the first of equal images; and how often each occurs.
    """
    rows = _rows(np.concatenate([train, held_out]))
    _, first, image, occurrences = np.unique(rows, return_index=True, return_inverse=True, return_counts=True)
    seen = np.bincount(image[: len(train)], minlength=len(first))
    chosen = np.flatnonzero((seen == 0) | (seen == occurrences))
    chosen = chosen[first[chosen].argsort()]
    return first[chosen], occurrences[chosen]


def _rows(images: NDArray) -> NDArray[np.void]:
    """One comparable element for each image."""
    flat = np.ascontiguousarray(images.reshape(len(images), -1))
    return flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))).ravel()
