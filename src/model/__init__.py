"""Networks: `network(x, label, condition) -> output`; see `base` for the interface."""

from src.model.base import ForeignNetwork, Network, adapted
from src.model.dit import DiT
from src.model.edm2 import EDM2
from src.model.encoder import Encoder
from src.model.resampling_unet import ResamplingUNet
from src.model.unet import UNet

__all__ = ["EDM2", "DiT", "Encoder", "ForeignNetwork", "Network", "ResamplingUNet", "UNet", "adapted"]
