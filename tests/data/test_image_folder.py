import contextlib
import io
import os
import re
import resource
import shutil
import struct
import zlib
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from src.data.datamodule import ImageDataModule
from src.data.folder_index import FolderIndex
from src.data.image_folder import ImageFolder
from src.data.indexed import DecodedImages, StreamedImages
from src.data.stream import FixedOrder
from src.errors import UserError

SIZE = 16


def noise(seed=0, size=(SIZE, SIZE), channels=3) -> np.ndarray:
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(picture, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def png(
    width: int, height: int, bits: int, colour: int, rows: bytes, transparent: bytes | None = None
) -> bytes:
    """Encodes a PNG of a kind that Pillow cannot write; `transparent` is the content of tRNS."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    transparency = b"" if transparent is None else chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparency + end


def tiff(bits: int, rows: bytes, photometric: int = 1, sample_format: int = 1) -> bytes:
    """Encodes a grey TIFF with one strip, SIZE x SIZE, little-endian."""
    tags = {256: SIZE, 257: SIZE, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: SIZE}
    tags |= {279: len(rows), 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + rows


def whole(root: Path, tmp_path: Path, **options) -> torch.Tensor:
    """All images of a folder as one set, sorted by path."""
    options = {"image_size": SIZE, "holdout": 0, "cache": str(tmp_path / "cache")} | options
    images = ImageFolder(str(root), **options).split("train")
    return images.images(range(len(images)))


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    return root


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture[: SIZE // 2] = 255
    return encoded(picture, "JPEG", quality=100, exif=exif)


FAULTY = {
    "truncated.jpg": (encoded(noise(size=(64, 64)), "JPEG")[:-500], "truncated"),
    "truncated.png": (encoded(noise(size=(64, 64)))[:-500], "Truncated"),
    "endless.png": (encoded(noise())[:-12], "truncated"),
    "flipped_bit.png": (encoded(noise()).replace(b"IDAT\x78", b"IDAT\x79", 1), "checksum"),
    "truncated.webp": (encoded(noise(size=(64, 64)), "WEBP")[:-300], ""),
    "truncated.gif": (encoded(noise(size=(64, 64)), "GIF")[:-300], "truncated"),
    "truncated.bmp": (encoded(noise(), "BMP")[:-30], "truncated"),
    "truncated.tiff": (encoded(noise(), "TIFF")[:-300], ""),
    "empty.jpg": (b"", "empty file"),
    "header_only.jpg": (encoded(noise(), "JPEG")[:20], ""),
    "header_only.png": (encoded(noise())[:33], ""),
    "text.jpg": (b"<html>not found</html>", "not an image"),
    "zeros.jpg": (bytes(1000), "not an image"),
    "bomb.png": (png(20_000, 20_000, 8, 0, b""), "400000000 pixels"),
    "float_out_of_range.tiff": (
        encoded(np.linspace(-3, 900, SIZE**2, dtype=np.float32).reshape(SIZE, SIZE), "TIFF"),
        r"from -3 to 900, not within \[0, 1\]",
    ),
    "float_nan.tiff": (encoded(np.full((SIZE, SIZE), np.nan, np.float32), "TIFF"), "nan"),
    "integers.tiff": (encoded(np.arange(SIZE**2, dtype=np.int32).reshape(SIZE, SIZE), "TIFF"), "white point"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_file_is_named_or_skipped(root, tmp_path, name, caplog):
    content, reason = FAULTY[name]
    (root / "good.png").write_bytes(encoded(noise()))
    (root / name).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"1 of 2 images .*{re.escape(name)} \(.*{reason}.*on_error=skip"
    ) as caught:
        whole(root, tmp_path)
    assert "\n" not in str(caught.value)
    for _ in range(2):
        caplog.clear()
        assert torch.equal(whole(root, tmp_path, on_error="skip")[0], torch.tensor(noise()).permute(2, 0, 1))
        assert name in caplog.text


def test_dangling_link_folder_and_pipe_with_image_names(root, tmp_path, caplog):
    (root / "good.png").write_bytes(encoded(noise()))
    (root / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.png")
    with pytest.raises(
        UserError, match=r"2 of 3 .*dangling.jpg \(dangling link\), pipe.png \(not a regular file\)"
    ):
        whole(root, tmp_path)
    assert len(whole(root, tmp_path, on_error="skip")) == 1


def test_error_counts_faulty_files_and_names_the_first(root, tmp_path):
    for i in range(9):
        (root / f"{i}.jpg").write_bytes(b"")
    (root / "good.png").write_bytes(encoded(noise()))
    with pytest.raises(UserError, match=r"9 of 10 .*0.jpg .*4.jpg \(empty file\) and 4 more; set"):
        whole(root, tmp_path)


def test_folder_without_usable_images_is_an_error_even_when_skipping(root, tmp_path):
    (root / "0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="no image is left"):
        whole(root, tmp_path, on_error="skip")


RAMP = np.linspace(0, 65535, SIZE**2).round().astype(np.uint16).reshape(SIZE, SIZE)
RAMP_8 = torch.tensor(np.rint(RAMP / 257).astype(np.uint8))


def grey(values: torch.Tensor) -> torch.Tensor:
    return values.expand(3, SIZE, SIZE)


def test_16_bits_keep_their_brightness(root, tmp_path):
    (root / "a.png").write_bytes(encoded(RAMP))
    (root / "b.tiff").write_bytes(encoded(RAMP, "TIFF"))
    big_endian = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RAMP)
    (root / "c.png").write_bytes(png(SIZE, SIZE, 16, 0, big_endian))
    images = whole(root, tmp_path)
    assert all(torch.equal(image, grey(RAMP_8)) for image in images)


def test_floats_in_the_unit_interval_are_scaled(root, tmp_path):
    (root / "a.tiff").write_bytes(encoded((RAMP / 65535).astype(np.float32), "TIFF"))
    assert torch.equal(whole(root, tmp_path)[0], grey(RAMP_8))


RAMP_12 = np.linspace(0, 4095, SIZE**2).round().astype(np.uint16).reshape(SIZE, SIZE)


def test_12_bits_in_files_of_16_are_reported_and_data_white_scales_them(root, tmp_path, caplog):
    (root / "a.png").write_bytes(encoded(RAMP_12))
    (root / "b.tiff").write_bytes(encoded(RAMP_12.astype(np.int32), "TIFF"))
    (root / "c.tiff").write_bytes(encoded(RAMP_12.astype(np.float32), "TIFF"))
    assert whole(root, tmp_path, on_error="skip").max() == 16
    assert "brighter than 6.3 % of white" in caplog.text
    assert "data.white=4095" in caplog.text
    caplog.clear()
    images = whole(root, tmp_path, white=4095)
    want = torch.tensor(np.rint(RAMP_12 / 4095 * 255).astype(np.uint8))
    assert all(torch.equal(image, grey(want)) for image in images)
    assert "white" not in caplog.text
    # The streamed path scales too.
    assert torch.equal(whole(root, tmp_path, white=4095, memory_limit_mb=0), images)


def test_bright_16_bit_sets_and_dark_8_bit_sets_give_no_warning(root, tmp_path, caplog):
    (root / "a.png").write_bytes(encoded(np.zeros((SIZE, SIZE), np.uint8)))
    (root / "b.png").write_bytes(encoded(RAMP))
    (root / "c.png").write_bytes(encoded(RAMP_12))
    whole(root, tmp_path)
    assert "white" not in caplog.text


def test_dark_16_bit_colour_is_reported_and_data_white_is_refused_for_it(root, tmp_path, caplog):
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in RAMP_12)
    (root / "a.png").write_bytes(png(SIZE, SIZE, 16, 2, rows))
    whole(root, tmp_path)
    assert "of white" in caplog.text
    with pytest.raises(UserError, match=r"a.png \(16 bits of colour"):
        whole(root, tmp_path, white=4095)


def test_values_above_white_are_refused(root, tmp_path):
    (root / "a.png").write_bytes(encoded(RAMP))
    with pytest.raises(UserError, match=r"a.png \(values from 0 to 65535, not within \[0, 4095\]"):
        whole(root, tmp_path, white=4095)


def test_tiff_of_12_bits_is_scaled_by_its_bit_depth(root, tmp_path):
    digits = (RAMP_12[..., None] >> np.arange(12)[::-1]) & 1
    (root / "a.tiff").write_bytes(tiff(12, np.packbits(digits.astype(np.uint8)).tobytes()))
    want = torch.tensor(np.rint(RAMP_12 / 4095 * 255).astype(np.uint8))
    assert torch.equal(whole(root, tmp_path)[0], grey(want))


@pytest.mark.parametrize(("bits", "kind"), [(8, "u1"), (16, "<u2")])
def test_tiff_where_white_is_zero(root, tmp_path, bits, kind):
    values = RAMP if bits == 16 else RAMP >> 8
    (root / "a.tiff").write_bytes(tiff(bits, values.astype(kind).tobytes(), photometric=0))
    want = torch.tensor(np.rint((2**bits - 1 - values.astype(int)) * 255 / (2**bits - 1)).astype(np.uint8))
    assert torch.equal(whole(root, tmp_path)[0], grey(want))


@pytest.mark.parametrize(("bits", "kind"), [(8, "i1"), (16, "<i2")])
def test_signed_values_need_data_white(root, tmp_path, bits, kind):
    values = np.arange(SIZE**2).reshape(SIZE, SIZE) % 101
    (root / "a.tiff").write_bytes(tiff(bits, values.astype(kind).tobytes(), sample_format=2))
    with pytest.raises(UserError, match=r"a.tiff \(signed integers.*data.white"):
        whole(root, tmp_path)
    want = torch.tensor(np.rint(values / 100 * 255).astype(np.uint8))
    assert torch.equal(whole(root, tmp_path, white=100)[0], grey(want))
    values[0, 0] = -1
    (root / "a.tiff").write_bytes(tiff(bits, values.astype(kind).tobytes(), sample_format=2))
    with pytest.raises(UserError, match="values from -1 to 100"):
        whole(root, tmp_path, white=100)


def test_16_bit_colour_keeps_its_brightness(root, tmp_path):
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in RAMP)
    (root / "a.png").write_bytes(png(SIZE, SIZE, 16, 2, rows))
    assert (whole(root, tmp_path)[0].int() - grey(RAMP_8).int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(root, tmp_path, mode):
    alpha = np.zeros((SIZE, SIZE), np.uint8)
    alpha[:, : SIZE // 2] = 255
    picture = Image.fromarray(np.dstack([np.full((SIZE, SIZE, 3), 40, np.uint8), alpha]))
    options = {}
    if mode == "P":
        # Index 0 is dark and opaque, index 1 is black and transparent.
        picture = Image.fromarray((alpha == 0).astype(np.uint8)).convert("P")
        picture.putpalette([40, 40, 40, 0, 0, 0])
        options["transparency"] = 1
    (root / "a.png").write_bytes(encoded(picture if mode == "P" else picture.convert(mode), **options))
    for channels in (1, 3):
        image = whole(root, tmp_path, channels=channels)[0]
        assert image[:, :, : SIZE // 2].unique().tolist() == [40]
        assert image[:, :, SIZE // 2 :].unique().tolist() == [255]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_only_the_transparent_grey_of_a_png_becomes_white(root, tmp_path, bits):
    # tRNS contains a value at the bit depth of the file (PNG specification, 11.3.2.1).
    last = 2**bits - 1
    values = np.arange(SIZE**2).reshape(SIZE, SIZE) * 257 % 2**bits if bits > 4 else None
    if values is None:
        values = np.indices((SIZE, SIZE)).sum(0) % 2**bits
    chosen = int(values[0, 1])
    digits = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = b"".join(b"\0" + np.packbits(row.astype(np.uint8).reshape(-1)).tobytes() for row in digits)
    (root / "a.png").write_bytes(png(SIZE, SIZE, bits, 0, rows, struct.pack(">H", chosen)))
    want = np.where(values == chosen, 255, np.rint(values * 255 / last)).astype(np.uint8)
    assert torch.equal(whole(root, tmp_path, channels=1)[0, 0], torch.tensor(want))


def test_transparent_colour_of_a_16_bit_png_becomes_white(root, tmp_path):
    values = np.full((SIZE, SIZE, 3), 1000, ">u2")
    values[: SIZE // 2] = [2000, 30000, 5]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (root / "a.png").write_bytes(png(SIZE, SIZE, 16, 2, rows, struct.pack(">3H", 2000, 30000, 5)))
    image = whole(root, tmp_path)[0]
    assert image[:, : SIZE // 2].unique().tolist() == [255]
    assert image[:, SIZE // 2 :].unique().tolist() == [1000 >> 8]


def test_half_transparent_is_halfway_to_white(root, tmp_path):
    (root / "a.png").write_bytes(encoded(Image.new("RGBA", (SIZE, SIZE), (0, 100, 255, 128))))
    # c * a + 255 * (1 - a), a = 128 / 255
    assert torch.allclose(
        whole(root, tmp_path)[0, :, 0, 0].float(), torch.tensor([127.0, 177.2, 255.0]), atol=1
    )


def test_palette_colours_are_looked_up(root, tmp_path):
    picture = Image.new("P", (SIZE, SIZE), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    (root / "a.gif").write_bytes(encoded(picture, "GIF"))
    assert whole(root, tmp_path)[0, :, 0, 0].tolist() == [10, 200, 30]


def test_cmyk_becomes_rgb(root, tmp_path):
    # No cyan, full magenta, full yellow, no black: red.
    (root / "a.jpg").write_bytes(
        encoded(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), "JPEG", quality=100)
    )
    assert torch.allclose(whole(root, tmp_path)[0].float().mean((1, 2)), torch.tensor([255.0, 0, 0]), atol=3)


def test_exif_orientation_is_applied(root, tmp_path):
    (root / "a.jpg").write_bytes(rotated_jpeg())
    # Orientation 6: the stored top is the right-hand side of the picture.
    image = whole(root, tmp_path)[0].float()
    assert image[:, :, SIZE // 2 + 2 :].mean() > 250
    assert image[:, :, : SIZE // 2 - 2].mean() < 5


def test_grey_and_colour_are_converted_to_the_channels_of_the_set(root, tmp_path):
    (root / "a.png").write_bytes(encoded(noise(channels=1)))
    (root / "b.png").write_bytes(encoded(noise()))
    colour, luma = whole(root, tmp_path), whole(root, tmp_path, channels=1)
    assert torch.equal(colour[0], grey(torch.tensor(noise(channels=1))))
    assert torch.equal(luma[0, 0], torch.tensor(noise(channels=1)))
    # ITU-R 601
    want = noise().astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(luma[1, 0].numpy() - want).max() <= 1


def test_images_are_scaled_by_the_shorter_side_and_centre_cropped(root, tmp_path):
    # The outer quarters are black; the centre crop is a grey square.
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 90
    (root / "wide.png").write_bytes(encoded(wide))
    (root / "tall.png").write_bytes(encoded(wide.transpose(1, 0, 2)))
    for image in whole(root, tmp_path):
        assert image[:, 2:-2, 2:-2].unique().tolist() == [90]


@pytest.mark.parametrize("memory_limit_mb", [0, 100])
def test_image_size_need_not_be_square(root, tmp_path, memory_limit_mb):
    picture = noise(size=(24, 12))
    (root / "a.png").write_bytes(encoded(picture))
    # White margins left and right of the crop to [12, 24].
    (root / "b.png").write_bytes(encoded(np.pad(picture, ((0, 0), (6, 6), (0, 0)), constant_values=255)))
    data = source(root, tmp_path, image_size=[12, 24], holdout=0, memory_limit_mb=memory_limit_mb)
    assert data.image_shape == (3, 12, 24)
    assert data.image_size == [12, 24]
    want = torch.tensor(picture).permute(2, 0, 1)
    assert all(torch.equal(image, want) for image in data.split("train").images([0, 1]))


def test_crop_that_drops_much_of_the_area_is_reported(root, tmp_path, caplog):
    for i in range(3):
        (root / f"{i}.png").write_bytes(encoded(noise(size=(96, 48))))
    whole(root, tmp_path, image_size=48)
    assert "drops 50 % or more of the area" in caplog.text
    assert "data.image_size=[48,96]" in caplog.text
    caplog.clear()
    whole(root, tmp_path, image_size=[48, 96])
    whole(root, tmp_path, image_size=[24, 40])  # one sixth is dropped
    for i in range(4):
        (root / f"square{i}.png").write_bytes(encoded(noise(size=(48, 48))))
    whole(root, tmp_path, image_size=48)
    assert not caplog.text


def test_scaling_is_antialiased(root, tmp_path):
    # The local mean of a pixel chessboard is 127.5; scaling without antialiasing would give 0 or 255.
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    (root / "a.png").write_bytes(encoded(board))
    image = whole(root, tmp_path)[0].float()
    assert 120 < image.min() <= image.max() < 135


def test_small_images_are_enlarged_with_a_warning_or_skipped(root, tmp_path, caplog):
    (root / "good.png").write_bytes(encoded(noise()))
    (root / "tiny.png").write_bytes(encoded(noise(size=(3, 5))))
    assert len(whole(root, tmp_path)) == 2
    assert "tiny.png (3x5)" in caplog.text
    with pytest.raises(UserError, match=r"tiny.png \(3x5 pixels\)"):
        whole(root, tmp_path, min_size=4)
    assert len(whole(root, tmp_path, min_size=4, on_error="skip")) == 1


def test_large_images_are_accepted(root, tmp_path, recwarn):
    (root / "large.png").write_bytes(encoded(Image.new("1", (10_000, 9_500))))
    assert len(whole(root, tmp_path)) == 1
    assert not recwarn.list


def test_ignored_frames_are_counted(root, tmp_path, caplog):
    frames = [Image.fromarray(noise(i)) for i in range(4)]
    for name in ("stack.tiff", "animation.gif", "animation.webp", "animation.png"):
        frames[0].save(root / name, save_all=True, append_images=frames[1:])
    (root / "single.tiff").write_bytes(encoded(noise()))
    images = whole(root, tmp_path)
    assert torch.equal(images[-1], torch.tensor(noise()).permute(2, 0, 1))
    assert "of 4 files with several frames only the first is used, 12 frames are left out" in caplog.text
    # The index stores the count, so that every start reports it.
    caplog.clear()
    whole(root, tmp_path)
    assert "12 frames" in caplog.text


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_no_file_starts_another_program(root, tmp_path, monkeypatch, name):
    """Pillow passes PostScript to Ghostscript, regardless of the file name."""
    tools, trace = tmp_path / "tools", tmp_path / "started"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {trace}\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    with contextlib.suppress(OSError):
        Image.open(io.BytesIO(script)).load()
    assert trace.exists(), "Pillow did not start Ghostscript, so the check below is void"
    trace.unlink()
    (root / "good.png").write_bytes(encoded(noise()))
    (root / name).write_bytes(script)
    with pytest.raises(UserError, match=rf"{name} \(not an image\)"):
        whole(root, tmp_path)
    assert not trace.exists()


def test_names_that_are_not_utf_8_can_be_logged(root, tmp_path, caplog):
    folder = os.fsencode(root) + b"/\xfe"
    os.mkdir(folder)
    Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(b"")
    Path(os.fsdecode(folder + b"/good.png")).write_bytes(encoded(noise(size=(3, 3))))
    data = source(root, tmp_path, on_error="skip", holdout=0, num_classes=1)
    assert len(data.split("train")) == 1
    assert r"\xfe/\xff.png" in caplog.text
    assert data.class_names == [r"\xfe"]
    for record in caplog.records:
        record.getMessage().encode()


def test_cyclic_links_end_and_no_image_is_read_twice(root, tmp_path, caplog):
    inner = root / "a" / "b"
    inner.mkdir(parents=True)
    for i in range(24):
        (inner / f"{i}.png").write_bytes(encoded(noise(i)))
    (inner / "up").symlink_to(root)
    for folder in (root, root / "a"):
        (folder / "self").symlink_to(folder / "self")
    (root / "again").symlink_to(inner)
    (root / "again.png").symlink_to(inner / "3.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes(encoded(noise(99)))
    (root / "linked").symlink_to(elsewhere)
    assert len(whole(root, tmp_path)) == 25
    assert "1 links" in caplog.text


def test_hidden_and_other_files_are_ignored_and_unusual_names_accepted(root, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in (".hidden.png", "._a.png", "naïve 画像.PNG", "a.b.JPEG"):
        (root / name).write_bytes(encoded(noise(), "JPEG" if name.endswith("JPEG") else "PNG"))
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe.png")).write_bytes(encoded(noise()))
    (root / ".git").mkdir()
    (root / ".git" / "x.png").write_bytes(encoded(noise()))
    (root / "notes.txt").write_text("x")
    for _ in range(2):
        assert len(whole(root, tmp_path)) == 3
    assert "1 .txt" in caplog.text


def several(root: Path, count: int, *folders: str) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / folder / f"{i:03d}.png").write_bytes(encoded(noise(i)))


def source(root, tmp_path, **options) -> ImageFolder:
    return ImageFolder(str(root), **({"image_size": SIZE, "cache": str(tmp_path / "cache")} | options))


def test_labels_are_the_first_folders(root, tmp_path):
    several(root, 3, "cat/black", "ant", "bee/x/y")
    data = source(root, tmp_path, num_classes=3, holdout=0)
    data.check()
    # Sorted by path: ant, bee, cat.
    assert data.split("train").labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert source(root, tmp_path).split("train").labels is None


def test_errors_of_class_folders(root, tmp_path):
    several(root, 2, "ant", "bee")
    with pytest.raises(UserError, match=r"2 class folders \(ant, bee\), not .*=7: set data.num_classes=2"):
        source(root, tmp_path, num_classes=7).check()
    (root / "stray.png").write_bytes(encoded(noise()))
    with pytest.raises(UserError, match=r"none of its class folders: stray.png"):
        source(root, tmp_path, num_classes=2).split("train")
    (root / "stray.png").unlink()
    (root / "cow").mkdir()
    with pytest.raises(UserError, match="without a usable image: cow"):
        source(root, tmp_path, num_classes=3).split("train")


def test_hashed_splits_are_disjoint_complete_and_stable(root, tmp_path):
    several(root, 200, "x")
    data = source(root, tmp_path, holdout=0.2)
    sets = {name: data.split(name) for name in ("train", "validation", "test")}
    rows = [set(s.rows.tolist()) for s in sets.values()]
    assert set.union(*rows) == set(range(200))
    assert sum(map(len, rows)) == 200
    # Five standard deviations of Binomial(200, 0.2).
    assert all(abs(len(r) - 40) < 5 * (200 * 0.16) ** 0.5 for r in rows[1:])
    before = sets["test"].images(range(len(sets["test"])))
    several(root, 30, "a_new_one")
    after = source(root, tmp_path, holdout=0.2).split("test")
    pixels = {image.numpy().tobytes() for image in after.images(range(len(after)))}
    assert {image.numpy().tobytes() for image in before} <= pixels


def test_split_folders(root, tmp_path):
    several(root, 3, "train/ant", "train/bee")
    several(root, 2, "val/bee")
    data = source(root, tmp_path, num_classes=2)
    assert [len(data.split(s)) for s in ("train", "validation", "test")] == [6, 2, 2]
    assert data.split("validation").labels.tolist() == [1, 1]
    several(root, 1, "test/ant")
    data = source(root, tmp_path, num_classes=2)
    assert [len(data.split(s)) for s in ("train", "validation", "test")] == [6, 2, 1]


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN", "Val"), ("training", "testing")])
def test_split_folders_with_other_names(root, tmp_path, names):
    several(root, 3, f"{names[0]}/ant", f"{names[0]}/bee")
    several(root, 2, f"{names[1]}/bee")
    data = source(root, tmp_path, num_classes=2)
    assert data.class_names == ["ant", "bee"]
    assert [len(data.split(s)) for s in ("train", "validation", "test")] == [6, 2, 2]


def test_two_folders_for_a_split_are_refused(root, tmp_path):
    several(root, 1, "train", "val", "Validation")
    with pytest.raises(UserError, match=r"several folders for validation \(Validation, val\)"):
        source(root, tmp_path).check()


def test_error_without_training_images_names_a_fix(root, tmp_path):
    place = int.from_bytes(blake2b(b"3.png", digest_size=8).digest(), "little") / 2**64
    assert place < 0.05  # the documented rule assigns the file to the test split
    (root / "3.png").write_bytes(encoded(noise()))
    data = source(root, tmp_path)
    with pytest.raises(UserError, match=r"no training images.*data\.holdout=0") as caught:
        data.split("train")
    assert "\n" not in str(caught.value)
    assert len(source(root, tmp_path, holdout=0).split("train")) == 1


def test_error_names_an_empty_training_folder(root, tmp_path):
    several(root, 2, "val")
    (root / "train").mkdir()
    with pytest.raises(UserError, match=r"no training images.*folder train"):
        source(root, tmp_path).split("train")


def test_no_validation_images_are_reported(root, tmp_path, caplog):
    several(root, 2, "x")
    assert len(source(root, tmp_path, holdout=0.001).split("validation")) == 0
    assert "no validation images" in caplog.text
    caplog.clear()
    source(root, tmp_path, holdout=0).split("validation")
    assert not caplog.text


def test_class_names_are_logged_in_the_order_of_the_labels(root, tmp_path, caplog):
    caplog.set_level("INFO")
    several(root, 1, "dog", "cat")
    data = source(root, tmp_path, num_classes=2, holdout=0)
    assert data.class_names == ["cat", "dog"]
    data.split("train")
    data.split("test")
    assert caplog.text.count("2 classes: 0 = cat, 1 = dog") == 1
    assert source(root, tmp_path).class_names == []


def test_class_names_that_are_numbers_out_of_order(root, tmp_path, caplog):
    several(root, 1, *map(str, range(11)))
    source(root, tmp_path, num_classes=11).prepare()
    assert "label 2 is folder 10" in caplog.text
    caplog.clear()
    (root / "10").rename(root / "a")
    source(root, tmp_path, num_classes=11).prepare()
    assert "label 2" not in caplog.text


def test_only_train_is_split_by_hash(root, tmp_path):
    several(root, 60, "train/ant", "train/bee")
    data = source(root, tmp_path, num_classes=2, holdout=0.2)
    sizes = [len(data.split(s)) for s in ("train", "validation", "test")]
    assert sum(sizes) == 120
    assert min(sizes) > 0


def test_memory_and_stream_agree(root, tmp_path):
    several(root, 12, "ant", "bee")
    for i in range(4):
        (root / "ant" / f"big{i}.jpg").write_bytes(encoded(noise(i, (50, 70)), "JPEG"))
    options = {"num_classes": 2, "holdout": 0.2}
    held = source(root, tmp_path, **options)
    streamed = source(root, tmp_path, memory_limit_mb=0, **options)
    for split in ("train", "validation", "test"):
        a, b = held.split(split), streamed.split(split)
        assert isinstance(a, DecodedImages)
        assert isinstance(b, StreamedImages)
        assert torch.equal(a.labels, b.labels)
        order = torch.randperm(len(a))
        assert torch.equal(a.images(order), b.images(order))


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_with_workers(root, tmp_path, workers):
    several(root, 10, "x")
    images = source(root, tmp_path, memory_limit_mb=0, holdout=0).split("train")
    loader = DataLoader(
        FixedOrder(images), batch_sampler=[[0, 3], [9, 1]], num_workers=workers, collate_fn=lambda b: b
    )
    assert torch.cat([batch.positions for batch in loader]).tolist() == [0, 3, 9, 1]


def test_error_names_a_file_damaged_after_indexing(root, tmp_path):
    several(root, 3, "x")
    images = source(root, tmp_path, memory_limit_mb=0, holdout=0).split("train")
    (root / "x" / "001.png").write_bytes(b"broken")
    assert images.images([0, 2]).shape == (2, 3, SIZE, SIZE)
    with pytest.raises(UserError, match=r"001\.png could be read when it was indexed .*not an image"):
        images.images([0, 1])


def break_unseen(path):
    """Damages a file as a faulty disk does: size and modification time stay the same."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_file_damaged_unnoticed_is_skipped_at_the_next_start(root, tmp_path):
    several(root, 3, "x")
    options = {"memory_limit_mb": 0, "holdout": 0}
    images = source(root, tmp_path, **options).split("train")
    break_unseen(root / "x" / "001.png")
    with pytest.raises(UserError, match="on_error=skip"):
        images.images([1])
    assert len(source(root, tmp_path, **options, on_error="skip").split("train")) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_error_for_a_damaged_file_is_the_same_with_workers(root, tmp_path, workers):
    several(root, 4, "x")
    data = ImageDataModule(source(root, tmp_path, memory_limit_mb=0, holdout=0), 4, seed=0, workers=workers)
    data.prepare_data()
    (root / "x" / "001.png").write_bytes(b"broken")
    loader = data.train_dataloader()
    with pytest.raises(UserError, match=r"^\S+001\.png could be read when it was indexed .*skip$"):
        next(iter(loader))
    if workers:  # the garbage collector would do it in a later test, and wait 20 seconds
        loader._iterator._shutdown_workers()


@pytest.mark.parametrize("memory_limit_mb", [0, 100])
def test_second_start_decodes_no_image_and_detects_a_changed_file(
    root, tmp_path, monkeypatch, memory_limit_mb
):
    several(root, 10, "x")
    (root / "bad.jpg").write_bytes(b"text")
    options = {"memory_limit_mb": memory_limit_mb, "on_error": "skip", "holdout": 0}
    first = source(root, tmp_path, **options)
    first.prepare()
    examined = []
    original = FolderIndex._examine
    monkeypatch.setattr(FolderIndex, "_examine", lambda *a: (examined.append(a[1].path), original(*a))[1])
    second = source(root, tmp_path, **options)
    assert len(second.split("train")) == 10
    assert examined == []
    assert second.fingerprint("train") == first.fingerprint("train")
    (root / "x" / "004.png").write_bytes(encoded(noise(77)))
    third = source(root, tmp_path, **options)
    assert torch.equal(third.split("train").images([4])[0], torch.tensor(noise(77)).permute(2, 0, 1))
    assert "x/004.png" in examined
    assert third.fingerprint("train") != first.fingerprint("train")
    # The cache keeps one pixel file per folder and no partial files.
    assert len(list((tmp_path / "cache").rglob("*.pixels"))) == (memory_limit_mb > 0)
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize("memory_limit_mb", [0, 100])
def test_fingerprint_depends_on_content_and_not_on_location(root, tmp_path, memory_limit_mb):
    several(root, 6, "ant", "bee")
    options = {"num_classes": 2, "holdout": 0, "memory_limit_mb": memory_limit_mb}
    first = source(root, tmp_path, **options).fingerprint("train")
    copied = tmp_path / "copied"
    shutil.copytree(root, copied, copy_function=shutil.copyfile)  # with other modification times
    assert source(copied, tmp_path, **options).fingerprint("train") == first
    assert source(copied, tmp_path, **options | {"image_size": 8}).fingerprint("train") != first
    (copied / "bee" / "003.png").write_bytes(encoded(noise(77)))
    assert source(copied, tmp_path, **options).fingerprint("train") != first


def test_disk_errors_are_not_stored_in_the_index(root, tmp_path, monkeypatch):
    several(root, 4, "x")
    read = Path.read_bytes

    def failing(self):
        if self.name == "002.png":
            raise OSError(5, "Input/output error")
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        assert len(whole(root, tmp_path, on_error="skip")) == 3
        with pytest.raises(UserError, match=r"002.png \(input/output error\)"):
            whole(root, tmp_path)
    assert len(whole(root, tmp_path)) == 4


def test_cached_pixels_depend_on_the_settings(root, tmp_path):
    (root / "a.png").write_bytes(encoded(noise(size=(40, 40))))
    assert whole(root, tmp_path).shape == (1, 3, 16, 16)
    assert whole(root, tmp_path, image_size=20, channels=1).shape == (1, 1, 20, 20)
    assert whole(root, tmp_path).shape == (1, 3, 16, 16)


def test_damaged_index_is_rebuilt(root, tmp_path, caplog):
    several(root, 3, "x")
    before = whole(root, tmp_path, memory_limit_mb=0)
    (index,) = (tmp_path / "cache").rglob("*.index")
    intact = index.read_bytes()
    for content in (b"", b"[]", b'{"x/000.png": 3}', intact[:-5], intact.replace(b'"x/000', b'"x/001')):
        caplog.clear()
        index.write_bytes(content)
        assert torch.equal(whole(root, tmp_path, memory_limit_mb=0), before)
        assert f"{index} is unreadable or damaged" in caplog.text
    caplog.clear()
    assert index.read_bytes() == intact
    whole(root, tmp_path, memory_limit_mb=0)
    assert not caplog.text


@pytest.mark.parametrize("damage", ["truncated", "changed", "longer", "empty", "folder"])
def test_damaged_pixels_are_decoded_again(root, tmp_path, caplog, damage):
    several(root, 5, "x")
    before = whole(root, tmp_path).clone()
    (path,) = (tmp_path / "cache").rglob("*.pixels")
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.unlink()
    if damage == "folder":
        path.mkdir()
        with pytest.raises(UserError, match=r"data\.cache"):
            whole(root, tmp_path)
        path.rmdir()
    else:
        path.write_bytes(
            {"truncated": content[:-500], "changed": content, "longer": content + b"0", "empty": b""}[damage]
        )
    assert torch.equal(whole(root, tmp_path), before)
    assert f"{path} is unreadable or damaged" in caplog.text
    caplog.clear()
    assert torch.equal(whole(root, tmp_path), before)
    assert not caplog.text


def test_full_disk_is_a_user_error(root, tmp_path):
    several(root, 50, "x")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # less than 50 images of 16 x 16 x 3 bytes
    try:
        with pytest.raises(UserError, match=r"data\.cache=.*cannot be written \(File too large\)"):
            whole(root, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_old_partial_files_in_the_cache_are_removed(root, tmp_path):
    several(root, 1, "x")
    old, recent = (tmp_path / "cache" / "image_folder" / f"{name}.partial" for name in ("old", "recent"))
    old.parent.mkdir(parents=True)
    for path in (old, recent):
        path.touch()
    os.utime(old, (0, 0))
    whole(root, tmp_path)
    assert recent.exists()
    assert not old.exists()


def test_missing_and_empty_folders_are_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"data\.root is not set"):
        ImageFolder(None, SIZE).check()
    with pytest.raises(UserError, match=r"data\.root=.*nowhere is not a readable folder"):
        source(tmp_path / "nowhere", tmp_path).check()
    with pytest.raises(UserError, match=r"data\.root=.* is empty"):
        source(root, tmp_path).check()
    (root / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="holds no images"):
        source(root, tmp_path).split("train")


def test_building_and_checking_decode_no_images(root, tmp_path):
    (root / "0.jpg").write_bytes(b"broken")
    source(root, tmp_path).check()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"image_size": [8]},
        {"image_size": [8, 0]},
        {"channels": 4},
        {"num_classes": -1},
        {"holdout": 0.5},
        {"on_error": "ignore"},
        {"white": 0},
    ],
)
def test_invalid_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageFolder(**{"root": "x", "image_size": SIZE} | wrong)
