"""Networks: `network(x, label, condition) -> image-shaped tensor`. They know nothing of noise schedules."""

from src.model.unet import UNet

__all__ = ["UNet"]
