"""Couplings against all permutations of small batches."""

from itertools import permutations

import torch

from src.conditioning import NO_CLASS, Condition
from src.training.coupling import Independent, OptimalTransport


def batch(n):
    return torch.randn(2, n, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def cost(x0, eps):
    return (x0 - eps).square().sum().item()


def test_optimal_transport_is_the_best_permutation():
    x0, eps = batch(6)
    found = OptimalTransport()(x0, eps, None)
    best = min(permutations(range(6)), key=lambda order: cost(x0, eps[list(order)]))
    assert torch.equal(found, eps[list(best)])
    assert cost(x0, found) < 0.9 * cost(x0, eps)
    assert Independent()(x0, eps, None) is eps


def test_within_classes_the_noise_of_a_class_stays_that_of_the_class():
    x0, eps = batch(8)
    labels = torch.tensor([0, 1, 0, 1, 1, NO_CLASS, NO_CLASS, 0])
    found = OptimalTransport(per_class=True)(x0, eps, Condition(labels=labels))
    for label in labels.unique():
        of_class = labels == label
        assert torch.equal(found[of_class], OptimalTransport()(x0[of_class], eps[of_class], None))
    assert not torch.equal(found, OptimalTransport()(x0, eps, None))
