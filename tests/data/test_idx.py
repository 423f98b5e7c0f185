import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data import idx
from src.data.fashion_mnist import FashionMNIST
from src.data.mnist import MNIST
from src.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n).astype(np.uint8))
        for name, n in (("train", 20), ("t10k", 7))
    }


def write(folder: Path, arrays, gzipped: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in arrays.items():
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            path = folder / f"{part}-{kind}-ubyte{'.gz' if gzipped else ''}"
            path.write_bytes(gzip.compress(content) if gzipped else content)
    return folder


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("source", [MNIST, FashionMNIST])
def test_reads_what_was_written(tmp_path, arrays, gzipped, source):
    data = source(root=str(write(tmp_path, arrays, gzipped)))
    data.check()
    for split, part in (("train", "train"), ("validation", "t10k"), ("test", "t10k")):
        images = data.split(split)
        assert np.array_equal(images.images(range(len(images))).squeeze(1).numpy(), arrays[part][0])
        assert images.labels.tolist() == arrays[part][1].tolist()


def test_torchvision_reads_the_same(tmp_path, arrays):
    from torchvision.datasets import FashionMNIST as Theirs

    write(tmp_path / "FashionMNIST" / "raw", arrays, gzipped=False)
    ours = FashionMNIST(root=str(tmp_path)).split("train")
    theirs = Theirs(tmp_path, train=True)
    assert torch.equal(ours.pixels.squeeze(1), theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


def test_32_pixels_are_28_with_a_black_border(tmp_path, arrays):
    write(tmp_path, arrays, gzipped=True)
    wide, plain = (MNIST(root=str(tmp_path), image_size=size).split("train").pixels for size in (32, 28))
    assert torch.equal(wide[:, :, 2:-2, 2:-2], plain)
    assert wide.sum() == plain.sum()


def spoil(content: bytes, how: str) -> bytes:
    return {
        "truncated": content[:-1],
        "too long": content + b"\0",
        "header only": content[:8],
        "empty": b"",
        "another magic": b"\0\0\x0d" + content[3:],
        "text": b"<html>404 not found</html>",
    }[how]


@pytest.mark.parametrize("how", ["truncated", "too long", "header only", "empty", "another magic", "text"])
@pytest.mark.parametrize("gzipped", [True, False])
def test_error_names_a_damaged_file(tmp_path, arrays, how, gzipped):
    write(tmp_path, arrays, gzipped)
    path = next(tmp_path.glob("train-images*"))
    spoilt = spoil(path.read_bytes() if not gzipped else gzip.decompress(path.read_bytes()), how)
    path.write_bytes(gzip.compress(spoilt) if gzipped else spoilt)
    with pytest.raises(UserError, match="train-images") as caught:
        MNIST(root=str(tmp_path)).split("train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [3, 20, -10])
def test_error_names_a_damaged_gzip_file(tmp_path, arrays, position):
    write(tmp_path, arrays, gzipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:position] if position > 0 else content[: len(content) + position])
    with pytest.raises(UserError, match="train-images"):
        MNIST(root=str(tmp_path)).split("train")


def test_labels_out_of_range_and_missing_labels_are_refused(tmp_path, arrays):
    arrays["train"][1][3] = 10
    data = MNIST(root=str(write(tmp_path / "a", arrays, gzipped=True)))
    with pytest.raises(UserError, match="from 0 to 10"):
        data.split("train")
    arrays["train"] = (arrays["train"][0], arrays["train"][1][:-1])
    with pytest.raises(UserError, match="19 labels"):
        MNIST(root=str(write(tmp_path / "b", arrays, gzipped=True))).split("train")


def test_missing_files_are_named_before_anything_loads(tmp_path):
    with pytest.raises(UserError, match=r"data\.root=.*mnist.*data\.root=null"):
        MNIST(root=str(tmp_path)).check()


def test_failed_download_is_a_one_line_error_with_a_fix(tmp_path, monkeypatch):
    def refuse(self, folder):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(idx, "CACHE", str(tmp_path))
    monkeypatch.setattr(MNIST, "download", refuse)
    MNIST().check()
    with pytest.raises(UserError, match=r"no route to host.*data\.root"):
        MNIST().split("train")


def test_downloaded_files_are_found_in_the_cache(tmp_path, monkeypatch, arrays):
    monkeypatch.setattr(idx, "CACHE", str(tmp_path))
    monkeypatch.setattr(
        MNIST, "download", lambda self, folder: write(folder / "MNIST" / "raw", arrays, gzipped=True)
    )
    assert len(MNIST().split("train")) == 20


@pytest.mark.parametrize("wrong", [{"image_size": 64}, {"channels": 3}, {"num_classes": 11}])
def test_unsupported_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FashionMNIST(**wrong)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_real_fashion_mnist():
    source = FashionMNIST()
    train, test = source.split("train"), source.split("test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    # Commonly used mean and standard deviation of the training pixels: 0.2860, 0.3530.
    pixels = train.pixels.float() / 255
    assert pixels.mean().item() == pytest.approx(0.2860, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3530, abs=5e-5)
