from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from src.data.source import InMemoryImages
from src.data.stream import FixedOrder, PositionSampler, ShardSampler, TrainingStream


def numbered(n: int) -> InMemoryImages:
    """Images of 1x2 pixels: the left pixel is the index of the image, the right pixel is 255."""
    pixels = torch.full((n, 1, 1, 2), 255, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(n)
    return InMemoryImages(pixels, torch.arange(n) % 7)


def seen(batch) -> set[tuple[int, int, bool]]:
    """(position, image, flipped) of each sample, decoded from the pixels."""
    left, right = batch.images[:, 0, 0].T.tolist()
    flipped = [a == 255 for a in left]
    images = [b if f else a for a, b, f in zip(left, right, flipped, strict=True)]
    assert [i % 7 for i in images] == batch.condition.labels.tolist()
    return set(zip(batch.positions.tolist(), images, flipped, strict=True))


def stream(n=101, global_batch_size=24, seed=5, flip=True) -> TrainingStream:
    return TrainingStream(numbered(n), seed, global_batch_size, flip)


def steps(stream: TrainingStream, count: int, start=0, world_size=1, accumulation=1) -> list[set]:
    size = stream.global_batch_size
    micro = size // (world_size * accumulation)
    ranks = [
        iter(PositionSampler(start, size, micro, rank, world_size, accumulation))
        for rank in range(world_size)
    ]
    return [
        set().union(*(seen(stream.__getitems__(b)) for rank in ranks for b in islice(rank, accumulation)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("global_batch_size", [24, 25, 101, 250])
def test_each_pass_sees_every_image_once(global_batch_size):
    data = stream(101, global_batch_size)
    samples = sorted(set().union(*steps(data, 404 // global_batch_size + 1)))
    for k in range(4):
        assert sorted(image for _, image, _ in samples[101 * k : 101 * (k + 1)]) == list(range(101))
    assert [p for p, _, _ in samples] == list(range(len(samples)))


def test_passes_and_seeds_differ_in_order():
    order = [stream().indices(torch.arange(101 * k, 101 * (k + 1))).tolist() for k in range(2)]
    assert order[0] != order[1]
    assert stream(seed=6).indices(torch.arange(101)).tolist() != order[0]


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 3), (4, 2), (8, 3)])
def test_steps_do_not_depend_on_sharding(world_size, accumulation):
    assert steps(stream(), 12, world_size=world_size, accumulation=accumulation) == steps(stream(), 12)


def test_start_continues_the_stream():
    assert steps(stream(), 5, start=7 * 24) == steps(stream(), 12)[7:]


def test_order_does_not_depend_on_the_batch_size():
    wide = sorted(set().union(*steps(stream(global_batch_size=48, flip=False), 5)))
    assert wide == sorted(set().union(*steps(stream(global_batch_size=24, flip=False), 10)))


def test_half_of_the_images_are_flipped():
    flips = stream(global_batch_size=50).flips(torch.arange(20_000)).float()
    # Five standard deviations of a fair coin.
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / 20_000**0.5


def test_no_flips_by_option():
    assert not any(flipped for step in steps(stream(flip=False), 5) for _, _, flipped in step)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(workers):
    data = stream(global_batch_size=24)
    loader = DataLoader(
        data, batch_sampler=PositionSampler(48, 24, 12, 1, 2), num_workers=workers, collate_fn=lambda b: b
    )
    for got, positions in zip(loader, islice(iter(PositionSampler(48, 24, 12, 1, 2)), 15), strict=False):
        want = stream(global_batch_size=24).__getitems__(positions)
        assert torch.equal(got.images, want.images)
        assert torch.equal(got.positions, want.positions)
        assert torch.equal(got.condition.labels, want.condition.labels)


def test_images_mirrored_later_are_those_mirrored_at_once():
    at_once, later = (
        TrainingStream(numbered(101), 5, 24, True, flip_later=flip_later) for flip_later in (False, True)
    )
    for positions in (range(24), range(90, 114)):
        expected, batch = at_once.__getitems__(positions), later.__getitems__(positions)
        assert expected.flips is None
        assert 0 < batch.flips.sum() < 24
        assert torch.equal(batch.mirrored(), expected.images)
        assert not torch.equal(batch.images, expected.images)


def test_sets_with_mirrored_images_of_their_own_are_mirrored_at_once():
    class Latents(type(numbered(1))):
        def mirrored(self, indices, images):
            return -images

    batch = TrainingStream(Latents(numbered(24).pixels, None), 5, 24, True, flip_later=True).__getitems__(
        range(24)
    )
    assert batch.flips is None


def test_flips_are_made_on_a_copy():
    images = numbered(30)
    before = images.pixels.clone()
    TrainingStream(images, 0, 30, True).__getitems__(range(30))
    assert torch.equal(images.pixels, before)


def test_unlabelled_sets_give_no_labels():
    images = InMemoryImages(numbered(5).pixels, None)
    assert TrainingStream(images, 0, 2, True).__getitems__(range(2)).condition.kinds == set()
    assert FixedOrder(images).__getitems__([1, 2]).condition.kinds == set()


def test_empty_training_set():
    with pytest.raises(ValueError, match="no images"):
        TrainingStream(InMemoryImages(torch.zeros(0, 1, 1, 2, dtype=torch.uint8), None), 0, 2, True)


def test_sampler_refuses_an_indivisible_batch():
    with pytest.raises(ValueError, match="global_batch_size=24"):
        PositionSampler(0, 24, 5, 0, 2, 2)


@pytest.mark.parametrize(
    ("n", "batch", "world"), [(101, 8, 1), (101, 8, 4), (33, 8, 4), (7, 8, 7), (64, 8, 2)]
)
def test_shards_partition_the_set_into_equally_many_batches_per_rank(n, batch, world):
    shards = [list(ShardSampler(n, batch, rank, world)) for rank in range(world)]
    assert {len(shard) for shard in shards} == {-(-n // (batch * world))}
    assert sorted(i for shard in shards for part in shard for i in part) == list(range(n))
    assert all(0 < len(part) <= batch for shard in shards for part in shard)


def test_more_devices_than_images_are_refused():
    with pytest.raises(ValueError, match="3 images"):
        ShardSampler(3, 8, 0, 4)
