"""Fashion-MNIST."""

from pathlib import Path

from src.data.idx import IdxSource

CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]


class FashionMNIST(IdxSource):
    """Zalando's pictures of clothing (Xiao et al. 2017, arXiv:1708.07747).

    Debian's package dataset-fashion-mnist is used where it is installed. Not mirrored by default, since all
    shoes point to the left. See `IdxSource` for splits and arguments.
    """

    name = "fashion_mnist"
    system_folder = "/usr/share/datasets/fashion-mnist"

    @property
    def class_names(self) -> list[str]:
        return CLASSES[: self.num_classes]

    def download(self, folder: Path) -> None:
        from torchvision.datasets import FashionMNIST as Download

        Download(folder, download=True)
