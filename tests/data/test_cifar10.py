import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from src.data import cifar10
from src.data.cifar10 import CIFAR10, read_batch
from src.errors import UserError


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did for the published files: one byte per character, without an encoding."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        content = text if isinstance(text, bytes) else text.encode("ascii")
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_string


def write_batch(path: Path, content) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    # The numpy module had another name when the files were published.
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def batch(n: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "batch_label": "training batch",
        "data": rng.integers(0, 256, (n, 3072), np.uint8),
        "labels": rng.integers(0, 10, n).tolist(),
        "filenames": [f"{i}.png" for i in range(n)],
    }


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        write_batch(folder / name, batch(4, i))
    return folder


@pytest.mark.parametrize("above", [True, False])
def test_reads_what_was_written(folder, above):
    source = CIFAR10(root=str(folder.parent if above else folder))
    source.check()
    train, test = source.split("train"), source.split("test")
    written = [batch(4, i) for i in range(6)]
    want = np.concatenate([b["data"] for b in written[:5]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(train.pixels.numpy(), want)
    assert train.labels.tolist() == [label for b in written[:5] for label in b["labels"]]
    assert np.array_equal(test.pixels.numpy(), written[5]["data"].reshape(-1, 3, 32, 32))
    assert torch.equal(source.split("validation").pixels, test.pixels)


def test_planes_are_rgb_in_row_major_order(tmp_path):
    # The format: 1024 red, 1024 green, 1024 blue values, row by row.
    data = np.zeros((1, 3072), np.uint8)
    data[0, 1024 + 32 * 5 + 7] = 200
    write_batch(tmp_path / "x", {"data": data, "labels": [3]})
    images, _ = read_batch(tmp_path / "x")
    assert images.nonzero().tolist() == [[0, 1, 5, 7]]


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def test_code_in_a_file_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil").write_bytes(pickle.dumps({"data": Evil(), "labels": []}, protocol=2))
    with pytest.raises(UserError, match=r"evil.*exec"):
        read_batch(tmp_path / "evil")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"text", pickle.dumps([1]), pickle.dumps({"data": b"", "labels": [1]})]
)
def test_error_names_an_invalid_file(tmp_path, content):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_1"):
        read_batch(tmp_path / "data_batch_1")


def test_truncated_file_and_wrong_shape_are_refused(folder):
    path = folder / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="data_batch_3"):
        CIFAR10(root=str(folder)).split("train")
    write_batch(path, {"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]})
    with pytest.raises(UserError, match="data_batch_3"):
        CIFAR10(root=str(folder)).split("train")


def test_missing_files_are_named_before_anything_loads(folder):
    (folder / "test_batch").unlink()
    with pytest.raises(UserError, match=r"data\.root=.*test_batch.*data\.root=null"):
        CIFAR10(root=str(folder)).check()


def test_failed_download_is_a_one_line_error_with_a_fix(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(cifar10, "CACHE", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", refuse)
    with pytest.raises(UserError, match=r"no route to host.*data\.root"):
        CIFAR10().split("train")


@pytest.mark.parametrize("wrong", [{"image_size": 64}, {"channels": 1}, {"num_classes": 100}])
def test_unsupported_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CIFAR10(**wrong)
