"""Networks: `network(x, label, condition) -> output`; see `base` for the interface."""

from src.model.base import ForeignNetwork, Network, adapted
from src.model.unet import UNet

__all__ = ["ForeignNetwork", "Network", "UNet", "adapted"]
