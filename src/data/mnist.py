"""MNIST."""

from pathlib import Path

from src.data.captions import DIGIT_TEMPLATES, DIGITS
from src.data.idx import IdxSource


class MNIST(IdxSource):
    """Handwritten digits (LeCun, Cortes, Burges 1998); see `IdxSource` for splits and arguments."""

    name = "mnist"
    caption_names = DIGITS
    caption_templates = DIGIT_TEMPLATES

    def download(self, folder: Path) -> None:
        from torchvision.datasets import MNIST as Download

        Download(folder, download=True)
