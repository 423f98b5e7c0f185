"""Images that are scored as they are: a folder, a zip file or an .npz file, of any origin."""

import os
import zipfile
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from src.data.decode import FORMATS, decode
from src.data.source import ImageSet
from src.errors import UserError

log = getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
GREY = ("1", "L", "I", "I;16", "F")
"""Pillow's modes of one channel."""
ORIENTATION = 0x0112
"""EXIF tag; Pillow applies it to the size of TIFF files by itself."""
LARGEST_FILE = 1 << 28
"""Bytes of one image file in a zip."""


class Statistics(NamedTuple):
    """Published statistics: mean (d,) and covariance (d, d) of features, float64."""

    mean: Tensor
    covariance: Tensor


class Given(NamedTuple):
    """What a path holds.

    Attributes:
        name: its last part.
        images: the images, if it has any.
        statistics: mu and sigma, if it has them.
    """

    name: str
    images: "GivenImages | None"
    statistics: Statistics | None


class GivenImages(ImageSet):
    """Unlabelled images of one shape, which are not scaled or cropped; files are decoded as `src.data.decode` says.

    Attributes:
        shape: (C, H, W).
        others: how many further files there are, which are left out.
    """

    labels = None
    shape: tuple[int, int, int]
    others: int = 0


class FileImages(GivenImages):
    """The image files of a folder, at any depth, or of a zip file, sorted by name.

    Args:
        where: the folder or the file.
        option: the option that names it, for messages.

    Raises:
        UserError: there are no images, one cannot be read, or they have several sizes or numbers of channels.
    """

    def __init__(self, where: Path, option: str):
        self.where, self.option = where, option
        self._zip = None if where.is_dir() else _opened_zip(where, option)
        names = [
            name
            for name in self._listed()
            if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
        ]
        self.names = sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES)
        if not self.names:
            raise UserError(f"{option}={where}: no image files in it ({', '.join(sorted(SUFFIXES))})")
        others = sorted(set(names) - set(self.names))
        self.others = len(others)
        if others:
            log.warning(
                "%s=%s: %d files that are no images are left out: %s",
                option,
                where,
                len(others),
                ", ".join(others[:3]) + (", ..." if len(others) > 3 else ""),
            )
        with tqdm(self.names, desc="reading sizes", unit="image", delay=2, leave=False) as names:
            shapes = [self._shape(name) for name in names]
        channels = next((shape[0] for shape in shapes if shape[0]), 1)
        self.shape = (channels, *shapes[0][1:])
        for name, shape in zip(self.names, shapes, strict=True):
            self._check(name, (shape[0] or channels, *shape[1:]))

    def _listed(self) -> list[str]:
        if self._zip is not None:
            return [info.filename for info in self._zip.infolist() if not info.is_dir()]
        return [
            Path(folder, name).relative_to(self.where).as_posix()
            for folder, _, files in os.walk(self.where)
            for name in files
        ]

    def _content(self, name: str) -> bytes:
        if self._zip is None:
            return (self.where / name).read_bytes()
        if self._zip.getinfo(name).file_size > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
        return self._zip.read(name)

    def _shape(self, name: str) -> tuple[int, int, int]:
        """(C, H, W) of a file as it will be decoded; C is 0 for a palette of greys, which fits grey and colour."""
        try:
            source = self.where / name if self._zip is None else BytesIO(self._content(name))
            with Image.open(source, formats=FORMATS) as image:
                channels = 1 if image.mode in GREY else 3
                if image.mode == "P":
                    colours = np.array(image.getpalette()).reshape(-1, 3)
                    channels = 0 if (colours == colours[:, :1]).all() else 3
                sides = (image.height, image.width)
                if "exif" in image.info and image.getexif().get(ORIENTATION, 1) >= 5:  # on its side
                    sides = sides[::-1]
                return (channels, *sides)
        except Exception as error:  # Pillow raises many kinds
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: Exception) -> UserError:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return UserError(
            f"{self.option}={self.where}: {name} cannot be read ({reason}); remove or replace it"
        )

    def _check(self, name: str, shape: tuple[int, int, int]) -> None:
        if shape != self.shape:
            raise UserError(
                f"{self.option}={self.where}: {name} is {in_words(shape)}, and {self.names[0]} is"
                f" {in_words(self.shape)}: all images must have one size and one number of channels"
            )

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """See `ImageSet`.

        Raises:
            UserError: a file cannot be decoded.
        """
        pixels = []
        for index in torch.as_tensor(indices).tolist():
            name = self.names[index]
            try:
                array = np.array(decode(self._content(name), self.shape[0]))
            except Exception as error:
                raise self._unreadable(name, error) from None
            image = torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)
            self._check(name, tuple(image.shape))
            pixels.append(image)
        return torch.stack(pixels).contiguous()

    @cached_property
    def _fingerprint(self) -> str:
        digest = sha256(f"{len(self)} {self.shape}".encode())
        with tqdm(self.names, desc="hashing images", unit="image", delay=2, leave=False) as names:
            for name in names:
                digest.update(sha256(self._content(name)).digest())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A hash of the files' bytes, in the order of their names."""
        return self._fingerprint


class ArrayImages(GivenImages):
    """An array of images, uint8, (n, H, W, C), (n, C, H, W) or (n, H, W), with 1 or 3 channels.

    Args:
        array: the array; it may be mapped from a file.
        where: its file.
        option: the option that names it, for messages.

    Raises:
        UserError: it has another type or shape.
    """

    def __init__(self, array: np.ndarray, where: Path, option: str):
        if array.dtype != np.uint8:
            raise UserError(
                f"{option}={where}: images must be uint8, not {array.dtype}; convert them with"
                " (x * 127.5 + 127.5).round().clip(0, 255) from [-1, 1]"
            )
        if array.ndim == 3:
            array = array[:, None]
        elif array.ndim == 4 and array.shape[3] in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
            raise UserError(
                f"{option}={where}: images have shape {array.shape}; give (number, height, width, 1 or 3 channels)"
            )
        self.array = array
        self.shape = tuple(int(side) for side in array.shape[1:])

    def __len__(self) -> int:
        return len(self.array)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.array[torch.as_tensor(indices).numpy()]))

    @cached_property
    def _fingerprint(self) -> str:
        digest = sha256(f"{self.array.shape}".encode())
        for start in range(0, len(self), 1024):
            digest.update(np.ascontiguousarray(self.array[start : start + 1024]))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        return self._fingerprint


def open_given(path: str, option: str) -> Given:
    """Opens a folder or a zip file of images, or an .npz file of images or of statistics (mu and sigma), or of both.

    Raises:
        UserError: it does not exist or is none of these.
    """
    where = Path(path).expanduser()
    if where.is_dir():
        return Given(where.resolve().name, FileImages(where, option), None)
    if not where.is_file():
        raise UserError(f"{option}={path}: no such folder or file")
    if where.suffix.lower() == ".npz":
        return _of_npz(where, option)
    if where.suffix.lower() == ".zip":
        return Given(where.name, FileImages(where, option), None)
    raise UserError(f"{option}={path}: give a folder of images, a .zip of images, or an .npz file")


def in_words(shape: Sequence[int]) -> str:
    """A shape for people, e.g. "32 x 32 in colour" (width x height)."""
    return f"{shape[2]} x {shape[1]} {'in colour' if shape[0] == 3 else 'grey'}"


def _opened_zip(where: Path, option: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(where)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{option}={where}: is no intact zip file ({error})") from None


def _of_npz(where: Path, option: str) -> Given:
    try:
        with np.load(where, allow_pickle=False) as file:
            names = set(file.files)
            moments = [file[name] for name in ("mu", "sigma")] if {"mu", "sigma"} <= names else None
        name = next((name for name in ("arr_0", "images", "samples") if name in names), None)
        array = None if name is None else _array(where, name)
        if not all(
            isinstance(one, np.ndarray) for one in (*(moments or ()), *(() if array is None else (array,)))
        ):
            raise ValueError("an entry is no array")
    except Exception as error:  # zip, zlib, lzma and numpy's headers raise many kinds on arbitrary bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{option}={where}: is no intact .npz file ({reason})") from None
    if array is None and moments is None:
        raise UserError(
            f"{option}={where}: has {', '.join(sorted(names)) or 'nothing'}; it must have images (arr_0) or statistics"
            " (mu and sigma)"
        )
    images = None if array is None else ArrayImages(array, where, option)
    return Given(where.name, images, None if moments is None else _statistics(*moments, where, option))


def _array(where: Path, name: str) -> np.ndarray:
    """An array of an .npz file; mapped, not read, where it is not compressed."""
    with zipfile.ZipFile(where) as file:
        info = file.getinfo(f"{name}.npy")
    if info.compress_type == zipfile.ZIP_STORED:
        with where.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
            file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
            if np.lib.format.read_magic(file) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if not fortran and not dtype.hasobject:
                    return np.memmap(where, dtype, "r", file.tell(), shape)
    with np.load(where, allow_pickle=False) as file:
        return file[name]


def _statistics(mu: np.ndarray, sigma: np.ndarray, where: Path, option: str) -> Statistics:
    for name, array in (("mu", mu), ("sigma", sigma)):
        if array.dtype.kind not in "fiu":
            raise UserError(f"{option}={where}: {name} has the type {array.dtype}; give real numbers")
    mean, covariance = (torch.from_numpy(np.asarray(one, dtype=np.float64)) for one in (mu, sigma))
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{option}={where}: mu of shape {tuple(mean.shape)} and sigma of shape {tuple(covariance.shape)} do not"
            " fit; sigma must be np.cov(features, rowvar=False)"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(
            f"{option}={where}: values of mu or sigma are not finite; give means and np.cov(features, rowvar=False)"
        )
    largest = float(covariance.abs().max())
    symmetric = (covariance + covariance.T) / 2
    equal = torch.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-6 * largest)
    eigenvalues = torch.linalg.eigvalsh(symmetric)
    # sums in float32 or float16 make zeros of singular covariances slightly negative
    if not equal or eigenvalues[0] < -1e-3 * eigenvalues[-1]:
        raise UserError(
            f"{option}={where}: sigma is no covariance: it is not symmetric or has negative eigenvalues; it must be"
            " np.cov(features, rowvar=False)"
        )
    return Statistics(mean, symmetric)
