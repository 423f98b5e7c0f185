"""Tables of images as Hugging Face stores them, written with its package and with pyarrow alone."""

import io
import re
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.captions import from_templates
from src.data.datamodule import ImageDataModule
from src.data.digits import Digits
from src.data.fashion_mnist import FashionMNIST
from src.data.huggingface import HuggingFace
from src.data.indexed import DecodedImages, StreamedImages
from src.data.mnist import MNIST
from src.errors import UserError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
SIZE = 8
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection other than between processes fails the test."""
    connect = socket.socket.connect

    def local(self, address):
        assert self.family == socket.AF_UNIX, f"a test of local files connects to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def noise(seed: int, size=(SIZE, SIZE)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def row(i: int, **changed) -> dict:
    content = {"image": {"bytes": encoded(noise(i)), "path": None}, "label": i % 3, "text": f"number {i}"}
    return content | changed


def table(rows: list[dict], **features) -> "datasets.Dataset":
    usual = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
        "text": datasets.Value("string"),
    }
    return datasets.Dataset.from_list(rows, features=datasets.Features(usual | features))


@pytest.fixture
def write(tmp_path):
    """write(rows, name="train", **features) -> the folder of the parquet file <name>.parquet."""

    def to(rows, name="train", **features) -> str:
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        # not to_parquet, which looks up addresses in the rows
        parquet.write_table(table(rows, **features).data.table, folder / f"{name}.parquet")
        return str(folder)

    return to


@pytest.fixture
def source(tmp_path):
    """source(path, ...) -> the source with a cache below the test's folder and no images held out."""

    def make(path, **options) -> HuggingFace:
        return HuggingFace(
            str(path), **{"image_size": SIZE, "holdout": 0, "cache": str(tmp_path / "cache")} | options
        )

    return make


LABELLED = {"num_classes": 3, "caption_column": "text"}


def assert_rows(images, numbers) -> None:
    """Checks pixels, labels and captions against those of `row`."""
    assert len(images) == len(numbers)
    wanted = torch.stack([torch.tensor(noise(i)).permute(2, 0, 1) for i in numbers])
    assert torch.equal(images.images(range(len(images))), wanted)
    assert images.labels.tolist() == [i % 3 for i in numbers]
    assert list(images.captions) == [f"number {i}" for i in numbers]


@pytest.mark.parametrize("kind", ["folder", "file", "saved", "saved splits", "images"])
def test_local_formats_give_the_same_rows(write, source, tmp_path, kind):
    rows = [row(i) for i in range(5)]
    path = tmp_path / "set"
    if kind in ("folder", "file"):
        write(rows)
        path = path / "train.parquet" if kind == "file" else path
    elif kind == "saved":
        table(rows).save_to_disk(path)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": table(rows)}).save_to_disk(path)
    else:
        path.mkdir()
        lines = ["file_name,label,text"]
        for i, each in enumerate(rows):
            (path / f"{i}.png").write_bytes(each["image"]["bytes"])
            lines.append(f"{i}.png,{NAMES[each['label']]},{each['text']}")
        (path / "metadata.csv").write_text("\n".join(lines))
    data = source(path, **LABELLED)
    assert_rows(data.split("train"), range(5))
    assert data.class_names == NAMES
    assert data.captioned
    assert not list((tmp_path / "set").rglob("*cache*"))


def test_columns_without_the_features_of_the_package(source, tmp_path):
    """pyarrow alone writes bytes and texts."""
    rows = [row(i) for i in range(4)]
    columns = {
        "pic": [each["image"]["bytes"] for each in rows],
        "kind": ["wasp", "ant", "wasp", "bee"],
        "lines": [["first", "second"], ["only"], ["a", "b"], [" c "]],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "plain.parquet")
    names = {"label_column": "kind", "caption_column": "lines", "num_classes": 3}
    data = source(tmp_path / "plain.parquet", image_column="pic", **names)
    assert data.split("train").labels.tolist() == [2, 0, 2, 1]
    assert data.class_names == ["ant", "bee", "wasp"]
    assert list(data.split("train").captions) == ["first", "only", "a", "c"]
    with pytest.raises(
        UserError, match=r"0 columns of images: set data.image_column to one of pic, kind, lines"
    ):
        source(tmp_path / "plain.parquet").prepare()
    with pytest.raises(UserError, match=r"lines.*not texts or integers.*pic, kind, lines"):
        source(tmp_path / "plain.parquet", image_column="pic", label_column="lines", num_classes=2).prepare()


def test_unlabelled_and_without_captions_by_default(write, source):
    data = source(write([row(i) for i in range(3)]))
    images = data.split("train")
    assert (images.labels, images.captions, data.captioned, data.class_names) == (None, None, False, [])


FAULTS = {
    "no image": {"image": None},
    "not an image": {"image": {"bytes": b"<html>", "path": None}},
    "Truncated": {"image": {"bytes": encoded(noise(9, (64, 64)))[:-500], "path": None}},
    "missing": {"image": {"bytes": None, "path": "https://example.com/a.png"}},
    "no label": {"label": None},
    "no caption": {"text": None},
}


@pytest.mark.parametrize("fault", [*FAULTS, "blank caption"])
def test_a_faulty_row_is_named_or_skipped(write, source, caplog, fault):
    reason = "no caption" if fault == "blank caption" else fault
    changed = FAULTS.get(fault, {"text": "  "})
    path = write([row(0), row(1, **changed), row(2), row(3, **changed), row(4)])
    with pytest.raises(
        UserError, match=rf"^2 of 5 .*train row 1 \(.*{reason}.*train row 3.*on_error=skip"
    ) as caught:
        source(path, **LABELLED).prepare()
    assert "\n" not in str(caught.value)
    for limit in (100, 0):
        caplog.clear()
        assert_rows(
            source(path, **LABELLED, on_error="skip", memory_limit_mb=limit).split("train"), [0, 2, 4]
        )
        assert "left out 2 of 5" in caplog.text
        assert "train row 3 (" in caplog.text


def test_unknown_labels_of_published_test_splits_are_missing_labels(write, source):
    path = write([row(0, label=-1), row(1)])
    with pytest.raises(UserError, match=r"train row 0 \(no label\)"):
        source(path, num_classes=3).prepare()
    assert len(source(path).split("train")) == 2  # labels are not used


def test_images_are_decoded_as_in_image_folder(write, source):
    """Orientation, transparency and 16 bits; test_image_folder.py has the other cases."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upper = np.zeros((SIZE, SIZE, 3), np.uint8)
    upper[: SIZE // 2] = 255
    pictures = [
        encoded(upper, "JPEG", quality=100, exif=exif),
        encoded(np.zeros((SIZE, SIZE, 4), np.uint8)),
        encoded(np.full((SIZE, SIZE), 65535, np.uint16)),
    ]
    rows = [row(i, image={"bytes": picture, "path": None}) for i, picture in enumerate(pictures)]
    rotated, transparent, deep = source(write(rows)).split("train").images(range(3))
    assert rotated[:, :, 5:].min() > 250
    assert rotated[:, :, :3].max() < 5
    assert transparent.min() == deep.min() == 255


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "img"}, r"data\.image_column=img.*train, it has image, label, text"),
        ({"caption_column": "caption"}, r"data\.caption_column=caption.*image, label, text"),
        ({"label_column": "kind", "num_classes": 3}, r"data\.label_column=kind.*image, label, text"),
        ({"num_classes": 4}, r"3 classes \(ant, bee, cat\).*set data\.num_classes=3"),
        ({"image_column": "text"}, r"3 of 3 .*train row 0 \(no encoded image but str\)"),
        ({"splits": {"train": "full"}}, r"no split full, it has train: set data\.splits\.train"),
        ({"splits": {"test": "held_out"}}, r"no split held_out.*data\.splits\.test"),
        ({"name": "small"}, r"'small' not found.*data\.name"),
    ],
)
def test_wrong_names_are_one_line_with_those_that_exist(write, source, options, words):
    path = write([row(i) for i in range(3)])
    with pytest.raises(UserError, match=words) as caught:
        source(path, **options).prepare()
    assert "\n" not in str(caught.value)


def test_integer_labels_above_num_classes(write, source):
    path = write([row(0, label=11), row(1, label=0)], label=datasets.Value("int64"))
    with pytest.raises(UserError, match=r"12 classes \(0, 1, 2, 3, 4, \.\.\.\).*set data\.num_classes=12"):
        source(path, num_classes=3).prepare()
    assert source(path, num_classes=12).split("train").labels.tolist() == [11, 0]


def test_paths_that_cannot_be_used(source, tmp_path):
    (tmp_path / "notes.csv").write_text("a,b")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet" * 20)
    (tmp_path / "empty").mkdir()
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise AssertionError('this ran')")
    for path, words in (
        (tmp_path / "nowhere", r"no such folder or file.*owner/name"),
        (tmp_path / "notes.csv", "is no parquet file"),
        (tmp_path / "broken.parquet", r"cannot be loaded \(.*[Pp]arquet"),
        (tmp_path / "empty", r"cannot be loaded \(.*doesn't contain any data files"),
        (tmp_path / "script", r"cannot be loaded \(Dataset scripts are no longer supported"),
        ("parquet", "no such folder or file"),
        ("owner/no_such_set", r"owner/no_such_set cannot be loaded \(Couldn't reach"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            source(path).prepare()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^data\.path is not set"):
        HuggingFace(None, SIZE, cache=str(tmp_path)).check()


def test_a_missing_package_is_one_line(write, source, monkeypatch):
    path = write([row(0)])
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("src.data.huggingface.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^data=huggingface needs the package datasets: pip install .*\[huggingface\]"
    ):
        source(path).check()


def test_splits(write, source):
    write([row(i) for i in range(6)])
    path = write([row(i) for i in range(6, 8)], "test")
    data = source(path, **LABELLED)
    assert_rows(data.split("train"), range(6))
    assert_rows(data.split("test"), range(6, 8))
    assert data.fingerprint("validation") == data.fingerprint("test")
    exchanged = source(path, **LABELLED, splits={"train": "test", "validation": "train", "test": None})
    assert_rows(exchanged.split("train"), range(6, 8))
    assert_rows(exchanged.split("validation"), range(6))
    assert_rows(exchanged.split("test"), range(6, 8))


def test_held_out_rows_depend_on_the_image_and_not_on_its_row(write, source):
    def captions(path) -> list[set[str]]:
        data = source(path, **LABELLED, holdout=0.2)
        return [set(data.split(split).captions) for split in ("train", "validation", "test")]

    numbers = list(range(60))
    parts = captions(write([row(i) for i in numbers]))
    assert sum(map(len, parts)) == 60
    assert min(map(len, parts)) > 4
    assert captions(write([row(i) for i in reversed(numbers)])) == parts
    assert all(
        part <= more for part, more in zip(parts, captions(write([row(i) for i in range(70)])), strict=True)
    )


def test_memory_and_stream_agree(write, source):
    path = write([row(i, image={"bytes": encoded(noise(i, (20, 11))), "path": None}) for i in range(9)])
    held, streamed = (source(path, **LABELLED, memory_limit_mb=limit).split("train") for limit in (100, 0))
    assert (type(held), type(streamed)) == (DecodedImages, StreamedImages)
    assert torch.equal(held.images([3, 8, 0]), streamed.images([3, 8, 0]))
    assert torch.equal(held.labels, streamed.labels)
    assert held.captions == streamed.captions


def test_streaming_with_workers(write, source):
    data = source(write([row(i) for i in range(8)]), memory_limit_mb=0)
    batches = [next(iter(ImageDataModule(data, 8, 0, workers).train_dataloader())) for workers in (0, 2)]
    assert torch.equal(batches[0].images, batches[1].images)


@pytest.mark.parametrize("memory_limit_mb", [0, 100])
def test_fingerprint_depends_on_images_labels_and_captions_and_not_on_location(
    write, source, tmp_path, memory_limit_mb
):
    def fingerprint(path, **options):
        return source(path, memory_limit_mb=memory_limit_mb, **LABELLED | options).fingerprint("train")

    path = write([row(i) for i in range(4)])
    first = fingerprint(path)
    shutil.copytree(path, tmp_path / "copied")
    assert fingerprint(tmp_path / "copied") == first
    assert fingerprint(path, caption_column=None) != first
    assert fingerprint(path, num_classes=0) != first
    for changed in ({"text": "other"}, {"label": 2}, {"image": {"bytes": encoded(noise(99)), "path": None}}):
        assert fingerprint(write([row(0), row(1, **changed), row(2), row(3)])) != first
    assert fingerprint(write([row(i) for i in range(4)])) == first


def test_second_start_decodes_nothing(write, source, monkeypatch):
    path = write([row(i) for i in range(4)])
    first = source(path).fingerprint("train")
    monkeypatch.setattr("src.data.image_index.decode", None)
    assert source(path).fingerprint("train") == first


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"splits": {"dev": "x"}}, "^splits must name"),
        ({"channels": 4}, "^channels"),
        ({"on_error": "no"}, "^on_error"),
    ],
)
def test_invalid_arguments(source, wrong, words):
    with pytest.raises(ValueError, match=words):
        source("x", **wrong)


def test_captions_from_class_names():
    assert from_templates(torch.tensor([1, 0, 1]), ["cat", "dog"], ["a {}", "one {}"]) == [
        "a dog",
        "one cat",
        "a dog",
    ]
    with_captions, without = Digits(captions=True), Digits()
    images = with_captions.split("train")
    assert images.labels[:4].tolist() == [0, 1, 2, 3]
    assert images.captions[:4] == [
        "the digit zero",
        "a handwritten one",
        "the digit two",
        "a handwritten three",
    ]
    assert with_captions.fingerprint("train") != without.fingerprint("train")
    assert Digits(num_classes=0, captions=True).split("test").captions == with_captions.split("test").captions
    assert without.split("train").captions is None
    for kind in (FashionMNIST, MNIST):
        assert kind(captions=True).captioned
        assert len(kind.caption_names) == len(kind().class_names)
        assert all(re.search(r"\{\}", template) for template in kind.caption_templates)
