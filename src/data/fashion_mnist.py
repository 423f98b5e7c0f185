"""Fashion-MNIST."""

from pathlib import Path

from src.data.idx import IdxSource

CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]

PHRASES = [
    *("a t-shirt", "trousers", "a pullover", "a dress", "a coat"),
    *("a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot"),
]
"""The classes in captions."""


class FashionMNIST(IdxSource):
    """Zalando's pictures of clothing (Xiao et al. 2017, arXiv:1708.07747).

    Debian's package dataset-fashion-mnist is used where it is installed. Not mirrored by default, since all
    shoes point to the left. See `IdxSource` for splits and arguments.
    """

    name = "fashion_mnist"
    system_folder = "/usr/share/datasets/fashion-mnist"
    caption_names = PHRASES
    caption_templates = ("a photo of {}", "a grey picture of {}", "{}")

    @property
    def class_names(self) -> list[str]:
        return CLASSES[: self.num_classes]

    def download(self, folder: Path) -> None:
        from torchvision.datasets import FashionMNIST as Download

        Download(folder, download=True)
