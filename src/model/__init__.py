"""Networks: `network(x, label, condition) -> output`; `base` is their contract. They know no noise schedules."""

from src.model.base import ForeignNetwork, Network, adapted
from src.model.unet import UNet

__all__ = ["ForeignNetwork", "Network", "UNet", "adapted"]
