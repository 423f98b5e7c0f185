"""Networks: `network(x, label, condition) -> output`; see `base` for the interface."""

from src.model.base import ForeignNetwork, Network, adapted
from src.model.encoder import Encoder
from src.model.unet import UNet

__all__ = ["Encoder", "ForeignNetwork", "Network", "UNet", "adapted"]
