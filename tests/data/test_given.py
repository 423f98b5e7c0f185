"""Images of any origin: folders, zip files, .npz files of images and of published statistics."""

import logging
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.given import open_given
from src.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
WANTED = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())


def folder_of(path, pixels=PIXELS):
    path.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image.squeeze()).save(path / f"{number}.png")
    return path


def test_all_forms_hold_the_same_images(tmp_path):
    folder = folder_of(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in sorted(folder.iterdir()):
            file.write(path, f"sub/{path.name}")
    np.savez(tmp_path / "plain.npz", PIXELS)
    np.savez_compressed(tmp_path / "compressed.npz", images=PIXELS.transpose(0, 3, 1, 2))
    prints = {}
    for name in ("folder", "a.zip", "plain.npz", "compressed.npz"):
        given = open_given(str(tmp_path / name), "images")
        assert given.statistics is None
        assert given.images.shape == (3, 6, 4)
        assert len(given.images) == 5
        assert torch.equal(given.images.images([3, 0]), WANTED[[3, 0]])
        prints[name] = given.images.fingerprint()
    assert prints["folder"] == prints["a.zip"]
    assert prints["plain.npz"] == prints["compressed.npz"]


def test_an_array_that_is_not_compressed_is_mapped(tmp_path):
    np.savez(tmp_path / "plain.npz", np.zeros(3), arr_1=np.zeros(2), images=PIXELS)
    with pytest.raises(UserError, match="images must be uint8, not float64"):
        open_given(str(tmp_path / "plain.npz"), "images")
    np.savez(tmp_path / "plain.npz", PIXELS)
    array = open_given(str(tmp_path / "plain.npz"), "images").images.array
    while not isinstance(array, np.memmap):
        array = array.base
        assert array is not None


def test_grey_files_and_arrays(tmp_path):
    folder = folder_of(tmp_path / "grey", PIXELS[..., :1])
    np.savez(tmp_path / "grey.npz", PIXELS[..., 0])
    for name in (folder, tmp_path / "grey.npz"):
        images = open_given(str(name), "images").images
        assert images.shape == (1, 6, 4)
        assert torch.equal(images.images(range(5)), WANTED[:, :1])


def test_a_palette_of_greys_fits_grey_and_colour(tmp_path):
    palette = Image.fromarray(PIXELS[0, ..., 0]).convert("P")
    for name, channels in (("grey", 1), ("colour", 3)):
        folder = folder_of(tmp_path / name, PIXELS[..., :channels])
        palette.save(folder / "0.png")
        images = open_given(str(folder), "images").images
        assert images.shape == (channels, 6, 4)
        assert torch.equal(images.images([0])[0], WANTED[0, :1].expand(channels, -1, -1))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_a_file_on_its_side_has_the_size_of_the_upright_image(tmp_path, suffix):
    folder = folder_of(tmp_path / "folder")
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "0.png").unlink()
    Image.fromarray(np.rot90(PIXELS[0]).copy()).save(folder / f"0.{suffix}", exif=exif)
    images = open_given(str(folder), "images").images
    assert torch.equal(images.images([0, 1]), WANTED[:2])


def test_other_files_are_left_out_and_named(tmp_path, caplog):
    folder = folder_of(tmp_path / "folder")
    (folder / "notes.txt").touch()
    (folder / ".hidden").touch()
    with caplog.at_level(logging.WARNING):
        images = open_given(str(folder), "images").images
    assert (len(images), images.others) == (5, 1)
    assert "1 files that are no images are left out: notes.txt" in caplog.text


def test_published_statistics(tmp_path):
    sigma = np.cov(np.random.default_rng(1).normal(size=(20, 3)), rowvar=False)
    np.savez(tmp_path / "ref.npz", mu=np.arange(3.0), sigma=sigma)
    given = open_given(str(tmp_path / "ref.npz"), "reference")
    assert given.images is None
    torch.testing.assert_close(given.statistics.covariance, torch.from_numpy(sigma))
    np.savez(tmp_path / "adm.npz", arr_0=PIXELS, mu=np.arange(3.0), sigma=sigma)
    given = open_given(str(tmp_path / "adm.npz"), "reference")
    assert given.images is not None
    assert given.statistics is not None


def test_rounding_of_a_singular_covariance_is_no_mistake(tmp_path):
    features = np.random.default_rng(0).normal(size=(40, 128)).astype(np.float32)
    centred = features - features.mean(0)
    sigma = (centred.T @ centred / np.float32(39)).astype(np.float16)
    eigenvalues = np.linalg.eigvalsh(sigma.astype(np.float64))
    assert eigenvalues[0] < -1e-5 * eigenvalues[-1]
    np.savez(tmp_path / "ref.npz", mu=features.mean(0), sigma=sigma)
    assert open_given(str(tmp_path / "ref.npz"), "reference").statistics.covariance.dtype == torch.float64


def spoil(tmp_path, kind):
    folder = folder_of(tmp_path / "given")
    path = tmp_path / "given.npz"
    if kind == "size":
        Image.fromarray(PIXELS[0, :4]).save(folder / "9.png")
    elif kind == "channels":
        Image.fromarray(PIXELS[0, :, :, 0]).save(folder / "9.png")
    elif kind == "damaged":
        (folder / "9.png").write_bytes((folder / "0.png").read_bytes()[:20])
    elif kind == "no images":
        for file in folder.iterdir():
            file.unlink()
        (folder / "a.txt").touch()
    elif kind == "missing":
        return tmp_path / "nowhere"
    elif kind == "kind":
        path = tmp_path / "a.pkl"
        path.touch()
        return path
    elif kind == "zip":
        path = tmp_path / "a.zip"
        path.write_bytes(b"PK nothing")
        return path
    else:
        content = {
            "float": {"arr_0": PIXELS / 255.0},
            "shape": {"arr_0": PIXELS[..., :2]},
            "names": {"x": PIXELS},
            "pickle": {"arr_0": np.array([{}], dtype=object)},
            "axis": {"mu": np.zeros(3), "sigma": np.zeros((5, 5))},
            "nan": {"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)},
            "not symmetric": {"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])},
            "negative": {"mu": np.zeros(2), "sigma": np.diag([1.0, -1])},
            "complex": {"mu": np.zeros(2), "sigma": np.eye(2) * 1j},
            "text": {"mu": np.array(["a", "b"]), "sigma": np.eye(2)},
            "no features": {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        }.get(kind)
        if kind == "one array":
            with path.open("wb") as file:
                np.save(file, PIXELS)
        elif kind in ("no array", "huge"):
            header = (
                b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, 9999, 9999, 3), }".ljust(117)
                + b"\n"
            )
            entry = (
                b"abc" if kind == "no array" else b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header
            )
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                file.writestr("arr_0.npy", entry)
        elif kind in ("damaged npz", "encrypted"):
            np.savez_compressed(path, arr_0=PIXELS)
            content_of_file = bytearray(path.read_bytes())
            if kind == "damaged npz":
                content_of_file[100:140] = b"\xff" * 40
            else:  # the flag of the file's header and of the directory's entry
                content_of_file[6] |= 1
                content_of_file[content_of_file.index(b"PK\x01\x02") + 8] |= 1
            path.write_bytes(content_of_file)
        elif content is None:
            path.write_bytes(b"no zip")
        else:
            np.savez(path, **content)
        return path
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("size", "9.png is 4 x 4 in colour, and 0.png is 4 x 6 in colour: all images must have one size"),
        ("channels", "9.png is 4 x 6 grey, and 0.png is 4 x 6 in colour"),
        ("damaged", "9.png cannot be read"),
        ("no images", "no image files in it"),
        ("missing", "no such folder or file"),
        ("kind", "give a folder of images, a .zip of images, or an .npz file"),
        ("zip", "is no intact zip file"),
        ("float", "images must be uint8, not float64; convert them"),
        ("shape", r"images have shape \(5, 6, 4, 2\); give \(number, height, width, 1 or 3 channels\)"),
        ("names", r"has x; it must have images \(arr_0\) or statistics \(mu and sigma\)"),
        ("pickle", "is no intact .npz file"),
        ("axis", r"mu of shape \(3,\) and sigma of shape \(5, 5\) do not fit; .*rowvar=False"),
        ("nan", "values of mu or sigma are not finite"),
        ("not symmetric", "sigma is no covariance: .*rowvar=False"),
        ("negative", "sigma is no covariance: .*negative eigenvalues"),
        ("complex", "sigma has the type complex128; give real numbers"),
        ("text", "mu has the type <U1; give real numbers"),
        ("no features", r"mu of shape \(0,\) and sigma of shape \(0, 0\) do not fit"),
        ("damaged npz", "is no intact .npz file .*decompress"),
        ("one array", "is no intact .npz file"),
        ("no array", "is no intact .npz file"),
        ("huge", "is no intact .npz file"),
        ("encrypted", "is no intact .npz file .*encrypted"),
        ("empty", "is no intact .npz file"),
    ],
)
def test_bad_input_is_one_line_that_names_the_option(tmp_path, kind, words):
    with pytest.raises(UserError, match=f"^images=.*{words}") as raised:
        open_given(str(spoil(tmp_path, kind)), "images")
    assert "\n" not in str(raised.value)
