"""Nearest neighbours, and tests of copying: against other implementations, and their null distributions."""

import numpy as np
import pytest
from scipy.stats import kstest, mannwhitneyu

from src.metrics.memorisation import (
    attraction,
    copy_ratio,
    copying_test,
    distinct,
    in_one_set,
    membership_test,
    nearest,
)


def fresh(seed, *sizes, d=4):
    """Independent draws from one mixture of two Gaussians."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, d)) + 3 * rng.integers(0, 2, size=(n, 1)) for n in sizes]


def test_nearest_equals_all_pairs_and_finds_exact_copies():
    points, queries = (each.astype(np.float32) * 100 for each in fresh(0, 50, 20))
    queries[3] = points[7]
    found = nearest(queries, points, 3)
    pairs = np.linalg.norm(queries[:, None].astype(float) - points[None], axis=2)
    np.testing.assert_allclose(found.distances, np.sort(pairs, axis=1)[:, :3], rtol=1e-12)
    assert (found.distances[3, 0], found.indices[3, 0]) == (0, 7)
    assert nearest(queries, points[:2], 5).distances.shape == (20, 2)


def test_ratio_of_a_copy_a_midpoint_and_a_repeated_image():
    points = np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    queries = np.array([[0.1, 0.0], [0.5, 0.0]])
    assert copy_ratio(nearest(queries, points, 2).distances) == pytest.approx([0.1 / 0.9, 1])
    assert copy_ratio(nearest(queries, points, 3).distances)[0] == pytest.approx(0.1 / 1.9)
    # a repeated image hides its copies, so that repeated ones are removed first
    repeated = points[[0, 0, 1, 2]]
    assert copy_ratio(nearest(queries, repeated, 2).distances)[0] == pytest.approx(1)
    assert distinct(repeated).tolist() == [0, 2, 3]
    assert copy_ratio(np.zeros((1, 2))).tolist() == [0]


def test_attraction_sums_over_the_images_that_are_nearest():
    ratios, indices = np.array([0.1, 0.9, 1.2, 0.4]), np.array([2, 2, 0, 1])
    assert attraction(ratios, indices, 4) == pytest.approx([0, 0.6, 1.0, 0])


@pytest.mark.parametrize("digits", [1, 12])  # with and without ties
def test_copying_statistic_in_one_cell_is_that_of_mann_whitney(digits):
    x, y = (np.abs(each[:, 0]).round(digits) for each in fresh(1, 30, 40))
    statistic, test = copying_test(x, y, np.zeros(30), np.zeros(40))
    expected = mannwhitneyu(x, y, alternative="less", method="asymptotic", use_continuity=False)
    assert test.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert statistic == pytest.approx(test.z)


def test_copying_statistic_weights_cells_and_leaves_out_small_ones():
    x, y = (np.abs(each[:, 0]) for each in fresh(2, 43, 62))
    ours, held_out = np.repeat([0, 1, 2], [20, 20, 3]), np.repeat([0, 1, 2], [40, 20, 2])
    parts = [
        copying_test(x[ours == k], y[held_out == k], ours[ours == k], held_out[held_out == k]) for k in (0, 1)
    ]
    statistic, test = copying_test(x, y, ours, held_out)
    assert statistic == pytest.approx((2 * parts[0][0] + parts[1][0]) / 3)
    assert test.z == pytest.approx(statistic / (4 / 9 + 1 / 9) ** 0.5)
    assert np.isnan(copying_test(x[:2], y[:2], ours[:2], held_out[:2])[0])


def test_membership_has_the_moments_of_random_labels():
    rng = np.random.default_rng(0)
    neighbours = rng.integers(0, 30, size=80) ** 2 // 30  # some images are nearest to many
    sums = []
    for _ in range(4000):
        label = rng.permutation(30)
        sums.append((label[neighbours] < 20).sum())
    found = membership_test(neighbours, np.arange(30) < 20, np.ones(30, dtype=int))
    expected = ((neighbours < 20).sum() - np.mean(sums)) / np.std(sums)
    assert found.z == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("near_the_data", [False, True])
def test_repeated_images_give_no_false_alarms_of_membership(near_the_data):
    z = []
    for k in range(50):
        rng = np.random.default_rng(k)
        points = rng.normal(size=(300, 4))
        repeated = rng.permutation(np.concatenate([points, points[:150]]))
        generated = rng.normal(size=(200, 4))
        if near_the_data:  # more near the repeated ones
            generated = repeated[rng.integers(0, 450, size=200)] + 0.05 * generated
        z.append(membership(generated, repeated[:300], repeated[300:]).z)
    assert abs(np.mean(z)) < 0.45
    assert 0.8 < np.std(z) < 1.25


def test_repeated_training_images_that_are_copied_are_found():
    train, held_out, noise = fresh(0, 100, 100, 100)
    train[50:] = train[:10].repeat(5, axis=0)
    assert membership(train[50:] + 0.01 * noise[50:], train, held_out).z > 3
    assert np.isnan(membership(noise, train, train[:30]).z)


def test_images_in_one_set():
    train, held_out = np.array([[5], [3], [5], [2], [4]]), np.array([[1], [3], [6], [1]])
    chosen, occurrences = in_one_set(train, held_out)
    assert chosen.tolist() == [0, 3, 4, 5, 7]
    assert occurrences.tolist() == [2, 1, 1, 2, 1]


def p_values(generated, train, held_out):
    cells = [(each[:, 0] > 1.5).astype(int) for each in (generated, held_out)]
    distances = [nearest(each, train).distances[:, 0] for each in (generated, held_out)]
    return copying_test(*distances, *cells)[1].p, membership(generated, train, held_out).p


def membership(generated, train, held_out):
    chosen, occurrences = in_one_set(train, held_out)
    among = nearest(generated, np.concatenate([train, held_out])[chosen]).indices[:, 0]
    return membership_test(among, chosen < len(train), occurrences)


def test_p_values_of_fresh_images_are_uniform():
    found = np.array([p_values(*fresh(k, 80, 150, 80)) for k in range(300)])
    for p in found.T:
        assert kstest(p, "uniform").pvalue > 0.01
        assert (p <= 0.05).mean() < 0.1


def test_copies_are_found_and_typical_images_are_not_copies():
    generated, train, held_out = fresh(5, 200, 150, 100)
    copies = train[:100] + 0.01 * generated[:100]
    copying, membership = p_values(np.concatenate([copies, generated[:100]]), train, held_out)
    assert max(copying, membership) < 1e-6
    # images nearer to the centres of the classes are nearer to the training images, too: only C_T mistakes this
    centres = 3 * (generated[:, :1] > 1.5)
    copying, membership = p_values(centres + 0.5 * (generated - centres), train, held_out)
    assert copying < 1e-3
    assert membership > 0.05
