"""Sums of losses by noise level."""

import pytest
import torch

from src.training.callbacks.levels import KEPT, LossesByLevel


@pytest.mark.parametrize("batches", [1, KEPT, KEPT + 1, 2 * KEPT + 2])
def test_sums_are_those_of_single_losses(batches):
    generator = torch.Generator().manual_seed(batches)
    parts, found = 8, LossesByLevel(8, torch.device("cpu"))
    sums, counts = [0.0] * parts, [0] * parts
    for number in range(batches):
        losses = torch.rand(5, generator=generator)
        times = torch.rand(5, generator=generator, dtype=torch.float64)
        if number % 10 == 3:
            losses[number % 5] = torch.nan  # of a skipped step
        times[0] = number % 2  # both ends
        found.add(losses, times)
        for loss, time in zip(losses.tolist(), times.tolist(), strict=True):
            part = min(int(time * parts), parts - 1)
            if loss == loss:
                sums[part] += loss
                counts[part] += 1
    got_sums, got_counts = found.read()
    torch.testing.assert_close(got_sums, torch.tensor(sums), rtol=1e-5, atol=1e-5)
    assert got_counts.tolist() == counts
    assert [each.tolist() for each in found.read()] == [got_sums.tolist(), counts]  # nothing is counted twice
