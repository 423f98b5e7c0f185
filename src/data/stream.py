"""Training data as one endless stream of positions p = 0, 1, 2, ...

    image(p) = permutation(seed, p div n)[p mod n]
    flipped(p) = entry p mod G of the draw (seed, "flip", p div G),   G the global batch size

Both are functions of p alone, so that a run resumes from one integer (the number of samples consumed), and
the number of devices, workers and accumulated micro-batches changes nothing about what step k sees.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from src.conditioning import Condition
from src.data.source import ImageSet
from src.randomness import generator


@dataclass(eq=False)  # not frozen: Lightning's precision plugins rebuild it field by field
class Batch:
    """What a step gets.

    Attributes:
        images: uint8, shape (b, C, H, W); or floats, already encoded.
        condition: what the data know about each image, e.g. its label.
        positions: places in the training stream, int64, shape (b,), always on the CPU, where they key the draws; in
            validation and test the images' indices.
        flips: which images are mirrored by `mirrored`, bool, shape (b,); None for none.
    """

    images: Tensor
    condition: Condition
    positions: Tensor
    flips: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The batch on a device; positions stay on the CPU, so that reading them waits for nothing."""
        if self.images.device == torch.device(device):  # its parts are where the images are
            return self
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            condition=self.condition.to(device, non_blocking=non_blocking),
            flips=None if self.flips is None else self.flips.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, for DataLoader."""
        flips = None if self.flips is None else self.flips.pin_memory()
        images, condition = self.images.pin_memory(), self.condition.pin_memory()
        return replace(self, images=images, condition=condition, flips=flips)

    def mirrored(self) -> Tensor:
        """The images, those of `flips` mirrored, on their device."""
        if self.flips is None:
            return self.images
        return torch.where(self.flips[:, None, None, None], self.images.flip(-1), self.images)


class TrainingStream(Dataset):
    """Position p -> image, condition, flip; whole batches at a time.

    Args:
        image_set: n >= 1 images.
        seed: the run's seed.
        global_batch_size: samples of one optimiser step over all devices and micro-batches.
        horizontal_flip: mirror each image with probability 1/2.
        flip_later: leave that to `Batch.mirrored`, for an accelerator. Sets that keep mirrored images of their own are
            mirrored here.
    """

    def __init__(
        self,
        image_set: ImageSet,
        seed: int,
        global_batch_size: int,
        horizontal_flip: bool,
        flip_later: bool = False,
    ):
        if len(image_set) == 0:
            raise ValueError("the training split holds no images")
        self.image_set = image_set
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.horizontal_flip = horizontal_flip
        self.flip_later = flip_later and type(image_set).mirrored is ImageSet.mirrored
        self._permutations: dict[int, Tensor] = {}

    def indices(self, positions: Tensor) -> Tensor:
        """The images' indices at `positions`, int64 (b,). Each pass of n positions holds every image once."""
        n = len(self.image_set)
        passes = positions // n
        indices = torch.empty_like(positions)
        for k in passes.unique().tolist():
            here = passes == k
            indices[here] = self._permutation(k)[positions[here] % n]
        return indices

    def flips(self, positions: Tensor) -> Tensor:
        """Which of `positions` are mirrored, bool (b,)."""
        size = self.global_batch_size
        steps = positions // size
        flips = torch.empty(len(positions), dtype=torch.bool)
        for step in steps.unique().tolist():
            here = steps == step
            draws = torch.rand(size, generator=generator(self.seed, "flip", step))
            flips[here] = (draws < 0.5)[positions[here] % size]
        return flips

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        if isinstance(positions, range):  # faster than by reading its numbers
            places = torch.arange(positions.start, positions.stop, positions.step)
        else:
            places = torch.as_tensor(positions, dtype=torch.int64)
        n, first = len(self.image_set), positions[0]
        if isinstance(positions, range) and first // n == positions[-1] // n and positions.step == 1:
            indices = self._permutation(first // n)[first % n : first % n + len(positions)]  # within a pass
        else:
            indices = self.indices(places)
        images = self.image_set.images(indices)
        flips = self.flips(places) if self.horizontal_flip else None
        if flips is not None and not self.flip_later:
            # On bytes, and by picking whole rows: several times faster than torch.where or index_copy.
            either = torch.cat([images, self.image_set.mirrored(indices, images)])
            images = either.index_select(0, torch.arange(len(places)) + len(places) * flips)
            flips = None
        return Batch(images, self.image_set.condition(indices), places, flips)

    def _permutation(self, k: int) -> Tensor:
        if k not in self._permutations:
            # A batch straddles two passes at a time (more only if it is larger than the set).
            self._permutations = {key: self._permutations[key] for key in list(self._permutations)[-1:]}
            self._permutations[k] = torch.randperm(
                len(self.image_set), generator=generator(self.seed, "permutation", k)
            )
        return self._permutations[k]


class FixedOrder(Dataset):
    """A set in its own order, as it is: `positions` are the images' indices."""

    def __init__(self, image_set: ImageSet):
        self.image_set = image_set

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        places = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(self.image_set.images(places), self.image_set.condition(places), places)


class PositionSampler(Sampler[range]):
    """An endless batch sampler: micro-batch m of step k on rank r is

        k * G + (m * world_size + r) * micro + [0, micro),   micro = G / (world_size * accumulation)

    Args:
        start: samples already consumed, over all ranks.
        global_batch_size: G.
        micro_batch_size: samples of one forward pass on one device.
        rank: this process, in [0, world_size).
        world_size: number of processes.
        accumulation: micro-batches of one optimiser step.
    """

    def __init__(
        self,
        start: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ):
        if micro_batch_size * world_size * accumulation != global_batch_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} is not micro_batch_size * world_size * accumulation "
                f"= {micro_batch_size} * {world_size} * {accumulation}"
            )
        self.start = start
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[range]:
        # Steps and their micro-batches lie end to end, so k and m need no counting.
        first = self.start + self.rank * self.micro_batch_size
        while True:
            yield range(first, first + self.micro_batch_size)
            first += self.world_size * self.micro_batch_size


class ShardSampler(Sampler[list[int]]):
    """One pass over n images in fixed order: rank r takes r, r + world_size, ...

    Every rank gets the same number of batches, of nearly equal sizes: no image is repeated to fill up, and no
    rank waits in a collective for a batch that another one does not have.

    Args:
        n: number of images, at least world_size.
        batch_size: largest batch of one device.
        rank: this process, in [0, world_size).
        world_size: number of processes.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1):
        if n < world_size:
            raise ValueError(
                f"{n} images cannot be shared among {world_size} devices: use at most {n} devices"
            )
        batches = -(-n // (batch_size * world_size))
        self._batches = [part.tolist() for part in torch.arange(rank, n, world_size).tensor_split(batches)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)
