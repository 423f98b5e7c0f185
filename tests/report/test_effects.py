"""Means over seeds and marginal means against numbers computed by hand and by scipy."""

import numpy as np
import pytest
from scipy import stats

from src.report.effects import Result, digits, interactions, marginal_means, mean


def results(values, seeds=(0, 1)):
    """Results with schedule, lr and seed from {(schedule, lr): [score of each seed]}."""
    return [
        Result({"schedule": schedule, "lr": lr}, str(seed), score)
        for (schedule, lr), scores in values.items()
        for seed, score in zip(seeds, scores, strict=False)
    ]


def test_an_interval_of_a_mean_is_that_of_scipy():
    values = [1.0, 2.5, 3.0, 7.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = mean(values)
    assert found.value == pytest.approx(np.mean(values))
    assert found.half == pytest.approx((high - low) / 2)
    assert mean([4.0]).half is None


def test_marginal_means_and_paired_differences():
    rows = marginal_means(
        results(
            {
                ("cosine", "1"): [1.0, 2.0],
                ("cosine", "2"): [3.0, 4.0],
                ("linear", "1"): [2.0, 3.5],
                ("linear", "2"): [4.0, 5.5],
            }
        )
    )
    found = {(row.option, row.value): row for row in rows}
    assert [(row.option, row.value) for row in rows] == [
        *(("schedule", "cosine"), ("schedule", "linear")),
        *(("lr", "1"), ("lr", "2")),
    ]
    best, other = found["schedule", "cosine"], found["schedule", "linear"]
    assert (best.mean.value, best.difference, best.results) == (2.5, None, 4)
    assert other.mean.value == 3.75
    # per seed 1.0 and 1.5; Student's t with one degree of freedom
    assert other.difference.value == 1.25
    assert other.difference.half == pytest.approx(
        stats.t.ppf(0.975, 1) * np.std([1.0, 1.5], ddof=1) / np.sqrt(2)
    )
    assert found["lr", "2"].difference.value == 2.0


def test_a_value_does_not_gain_by_results_that_are_missing():
    """linear has no result with lr=2, where all scores are bad: only lr=1 is compared."""
    rows = marginal_means(
        results({("cosine", "1"): [1.0, 1.0], ("cosine", "2"): [9.0, 9.0], ("linear", "1"): [2.0, 2.0]})
    )
    assert [(row.value, row.mean.value) for row in rows if row.option == "schedule"] == [
        ("cosine", 1),
        ("linear", 2),
    ]


def test_an_option_without_a_complete_block_is_left_out():
    rows = marginal_means(results({("cosine", "1"): [1.0], ("linear", "2"): [2.0]}))
    assert rows == []


def test_the_best_value_is_the_highest_if_higher_is_better():
    rows = marginal_means(results({("cosine", "1"): [0.5], ("linear", "1"): [0.9]}), higher_is_better=True)
    assert rows[0].value == "linear"


def test_interactions_against_a_two_way_analysis_by_hand():
    table = {("a", "x"): 1.0, ("a", "y"): 2.0, ("b", "x"): 3.0, ("b", "y"): 8.0}
    found = interactions(results({pair: [score, score + 1] for pair, score in table.items()}))
    assert len(found) == 4
    (row,) = [row for row in found if row.options == (("schedule", "b"), ("lr", "x"))]
    # of seed 0, rows: 1.5 and 5.5, columns: 2 and 5, whole: 3.5; the same effect for both seeds
    assert (row.mean.value, row.results) == (3.5, 2)
    assert row.effect.value == pytest.approx(3 - 5.5 - 2 + 3.5)
    assert row.effect.half == pytest.approx(0)
    assert row.mean.half == pytest.approx(stats.t.ppf(0.975, 1) * 0.5**0.5 / 2**0.5)


def test_an_additive_table_has_no_interaction():
    table = {(a, b): [float(i + 2 * j)] for i, a in enumerate("abc") for j, b in enumerate("xy")}
    found = interactions(results(table))
    assert len(found) == 6
    assert all(row.effect.value == pytest.approx(0) and row.effect.half is None for row in found)


def test_a_seed_without_all_pairs_has_no_part_in_interactions():
    table = {("a", "x"): [1.0, 7.0], ("a", "y"): [2.0, 7.0], ("b", "x"): [3.0, 7.0], ("b", "y"): [8.0]}
    found = interactions(results(table))
    assert [row.results for row in found] == [1] * 4
    assert interactions(results({("a", "x"): [1.0], ("b", "y"): [2.0]})) == []


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (1.23456, 0.0123, "1.235"),
        (1234.56, 45.0, "1235"),
        (0.51234, None, "0.5123"),
        (3.0, 1e-15, "3"),
        (None, None, "–"),
        (float("nan"), 0.1, "nan"),
    ],
)
def test_digits_follow_the_interval(value, half, text):
    assert digits(value, half) == text
