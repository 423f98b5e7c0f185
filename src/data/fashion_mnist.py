"""Fashion-MNIST."""

from pathlib import Path

from src.data.idx import IdxSource


class FashionMNIST(IdxSource):
    """Zalando's pictures of clothing (Xiao et al. 2017, arXiv:1708.07747).

    Debian's package dataset-fashion-mnist is found without a download. Not mirrored by default: shoes all
    point to the left. See `IdxSource` for splits and arguments.
    """

    name = "fashion_mnist"
    system_folder = "/usr/share/datasets/fashion-mnist"

    def download(self, folder: Path) -> None:
        from torchvision.datasets import FashionMNIST as Download

        Download(folder, download=True)
