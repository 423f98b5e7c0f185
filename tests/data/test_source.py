import pwd

import pytest
import torch

from src.data.cifar10 import CIFAR10
from src.data.datamodule import ImageDataModule
from src.data.digits import Digits
from src.data.fashion_mnist import FashionMNIST
from src.data.image_folder import ImageFolder
from src.data.mnist import MNIST
from src.data.source import ImageSource, InMemoryImages, user_path
from src.errors import UserError


class Bands(ImageSource):
    """A custom source with five channels and images that are not square."""

    name = "bands"

    def __init__(self, channels=5, image_size=(4, 6), num_classes=3):
        super().__init__(image_size, channels, num_classes, horizontal_flip=False)

    def _load(self, split):
        pixels = torch.arange(12 * 5 * 4 * 6).remainder(256).to(torch.uint8).reshape(12, 5, 4, 6)
        return InMemoryImages(pixels, torch.arange(12) % 3)


def test_a_source_may_have_any_shape():
    source = Bands()
    assert source.image_shape == (5, 4, 6)
    assert source.class_names == ["0", "1", "2"]
    batch = next(iter(ImageDataModule(source, batch_size=4, seed=0).train_dataloader()))
    assert batch.images.shape == (4, *source.image_shape)


def test_single_image_size_is_square():
    assert Bands(image_size=7).image_shape == (5, 7, 7)


@pytest.mark.parametrize(
    "wrong", [{"image_size": (4, 6, 3)}, {"image_size": 0}, {"channels": 0}, {"num_classes": -1}]
)
def test_invalid_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
        Bands(**wrong)


def test_image_set_returns_the_condition_of_its_images():
    images = Bands().split("train")
    assert images.condition([4, 2]).labels.tolist() == [1, 2]
    assert images.condition(torch.tensor([], dtype=torch.int64)).labels.shape == (0,)
    assert InMemoryImages(images.pixels, None).condition([4, 2]).labels is None


def test_class_names():
    assert CIFAR10().class_names[3] == "cat"
    assert FashionMNIST().class_names[7] == "Sneaker"
    assert Digits().class_names == [str(i) for i in range(10)]
    assert all(source(num_classes=0).class_names == [] for source in (CIFAR10, FashionMNIST, MNIST))


@pytest.fixture
def homeless(monkeypatch):
    """Removes the home folder: no HOME and no entry in the password database."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_error_without_a_home_folder_names_the_option_to_set(tmp_path):
    for option, use in (
        ("data.cache", lambda: ImageFolder(str(tmp_path), 8)),
        ("data.root", lambda: ImageFolder("~/pictures", 8, cache=str(tmp_path))),
        ("data.root", lambda: MNIST().split("train")),
        ("data.root", lambda: CIFAR10().split("train")),
        ("data.root", lambda: CIFAR10("~/cifar").check()),
    ):
        with pytest.raises(UserError, match=f"needs a home folder.*set {option} to"):
            use()
    assert user_path(tmp_path, "data.root") == tmp_path
    ImageFolder(str(tmp_path), 8, cache=str(tmp_path))
