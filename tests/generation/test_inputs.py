"""Images and masks from files and generated ones; mistakes in them are one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from src.errors import UserError
from src.generation.inputs import files_of, masks_of, read_image

SHAPE = (1, 4, 6)
GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def saved(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def test_grey_and_colour_files_keep_their_bytes(tmp_path):
    grey = saved(tmp_path / "grey.png", GREY)
    assert (read_image(grey, SHAPE, "task.images").numpy() == GREY).all()
    assert (read_image(grey, (3, 4, 6), "task.images").numpy() == GREY).all()
    colour = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    found = read_image(saved(tmp_path / "colour.png", colour), (3, 4, 6), "task.images")
    assert (found.permute(1, 2, 0).numpy() == colour).all()
    same = saved(tmp_path / "grey_as_colour.png", np.repeat(GREY[..., None], 3, axis=2))
    assert (read_image(same, SHAPE, "task.images").numpy() == GREY).all()


@pytest.mark.parametrize(
    ("pixels", "shape", "message"),
    [
        (np.zeros((5, 6), np.uint8), SHAPE, r"^task\.images: \S+ has 6 x 5 pixels and must have 6 x 4"),
        (
            np.eye(3, dtype=np.uint8)[None].repeat(4, 0).repeat(2, 1),
            SHAPE,
            "in colour, and must be grey; convert it, e.g. by Pillow",
        ),
        (GREY, (4, 4, 6), "this run's images have 4 channels"),
    ],
)
def test_other_sizes_and_channels_are_refused(tmp_path, pixels, shape, message):
    file = saved(tmp_path / "picture.png", pixels)
    with pytest.raises(UserError, match=message):
        read_image(file, shape, "task.images")


def test_scaled_files_have_the_run_s_size(tmp_path):
    file = saved(tmp_path / "picture.png", np.full((40, 30), 7, np.uint8))
    assert (read_image(file, SHAPE, "task.images", scaled=True) == 7).all()


def test_scaled_colour_becomes_grey_for_a_run_on_grey_images(tmp_path):
    file = saved(tmp_path / "picture.png", np.full((40, 60, 3), (200, 100, 0), np.uint8))
    luma = round(0.299 * 200 + 0.587 * 100)
    found = read_image(file, SHAPE, "task.images", scaled=True)
    assert found.shape == SHAPE
    assert (found == luma).all()
    assert read_image(file, (3, 4, 6), "task.images", scaled=True)[:, 0, 0].tolist() == [200, 100, 0]


def test_files_of_a_folder_are_sorted(tmp_path):
    for name in ("b.png", "a.PNG", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in files_of(str(tmp_path), "task.images")] == ["a.PNG", "b.png"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.png", "no such file or folder"),
        (lambda folder: folder, "the folder has no image files"),
    ],
)
def test_missing_files_are_reported(tmp_path, make, message):
    with pytest.raises(UserError, match=rf"^task\.images=\S+: {message}"):
        files_of(str(make(tmp_path)), "task.images")


def test_a_damaged_file_is_reported(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^task\.images: \S+x\.png cannot be read: not an image$"):
        read_image(tmp_path / "x.png", SHAPE, "task.images")


def test_generated_masks():
    box, _ = masks_of("box", 0.25, (1, 8, 8), 0, 2)
    assert box.shape == (2, 1, 8, 8)
    assert box[0, 0].nonzero().tolist() == [[y, x] for y in range(2, 6) for x in range(2, 6)]
    right, _ = masks_of("right", 0.5, (1, 8, 8), 0, 1)
    assert right[0, 0].all(dim=0).tolist() == [False] * 4 + [True] * 4
    random, record = masks_of("random", 0.3, (1, 32, 32), 0, 5)
    assert random.double().mean().item() == pytest.approx(0.3, abs=0.03)
    fewer, other = masks_of("random", 0.3, (1, 32, 32), 0, 2)
    assert torch.equal(random[:2], fewer)
    assert not torch.equal(random[0], random[1])
    assert record["sha256"] != other["sha256"]


def test_white_is_filled(tmp_path):
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2:4] = 255, 127
    filled, _ = masks_of(str(saved(tmp_path / "mask.png", mask)), 0.5, SHAPE, 0, 3)
    assert filled.shape == (3, 1, 4, 6)
    assert filled[2, 0].nonzero().tolist() == [[1, 2]]


def test_masks_that_do_not_fit_are_refused(tmp_path):
    black = saved(tmp_path / "black.png", np.zeros((4, 6), np.uint8))
    with pytest.raises(UserError, match=r"^task\.mask: \S+ has no white pixel"):
        masks_of(str(black), 0.5, SHAPE, 0, 1)
    with pytest.raises(UserError, match=r"^task\.mask: \S+ has 6 x 4 pixels and must have 8 x 4"):
        masks_of(str(black), 0.5, (1, 4, 8), 0, 1)
    saved(tmp_path / "white.png", np.full((4, 6), 255, np.uint8))
    with pytest.raises(UserError, match=r"^task\.mask=\S+: 2 files for 3 images"):
        masks_of(str(tmp_path), 0.5, SHAPE, 0, 3)
    with pytest.raises(UserError, match=r"^task\.mask=bax: no such file or folder; .*box, right, random$"):
        masks_of("bax", 0.5, SHAPE, 0, 1)
    with pytest.raises(ValueError, match=r"^share must be in"):
        masks_of("box", 0.0, SHAPE, 0, 1)
