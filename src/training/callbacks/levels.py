"""Sums of losses by noise level."""

import torch
from torch import Tensor

# Batches that are kept until they are added at once.
KEPT = 64


class LossesByLevel:
    """Sums and counts of losses in equal parts of the time range.

    Batches are kept and added together, since a dozen operations at each step cost more than the step of a small
    network on a CPU may, and as many kernel launches on a GPU.

    Args:
        parts: number of parts; part 0 has the least noise.
        device: of the losses.
    """

    def __init__(self, parts: int, device: torch.device):
        self.parts, self.device = parts, device
        self._sums, self._counts = torch.zeros(parts, device=device), torch.zeros(parts, device=device)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, losses: Tensor, times: Tensor) -> None:
        """Adds losses and their times; both of shape (b,), times in [0, 1]."""
        self._kept.append((losses, times))
        if len(self._kept) >= KEPT:
            self._sum_up()

    def read(self) -> tuple[Tensor, Tensor]:
        """Sums and counts, shape (parts,), on the device, without losses that are not finite, of skipped steps."""
        self._sum_up()
        return self._sums, self._counts

    def _sum_up(self) -> None:
        if not self._kept:
            return
        losses, times = (torch.cat(each) for each in zip(*self._kept, strict=True))
        self._kept = []
        part = (times * self.parts).long().clamp(0, self.parts - 1).to(losses.device, non_blocking=True)
        self._sums.index_add_(0, part, losses.float().nan_to_num(0, 0, 0))
        self._counts.index_add_(0, part, losses.isfinite().float())
