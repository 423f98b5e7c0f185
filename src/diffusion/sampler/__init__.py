"""Samplers: from noise to images along decreasing times. `base.py` has the sampling loop; one file per family."""

from .adams import DEIS, LMS
from .base import Path, Sampler, State, Visit, last_image
from .ddim import DDIM
from .ddpm import DDPM
from .dopri5 import Dopri5
from .dpm_solver import MultistepDPMSolver, SinglestepDPMSolver
from .edm import DPM2, Euler, Heun
from .euler_maruyama import EulerMaruyama
from .flow_map import FlowMap
from .inversion import encode, renoise, slerp
from .noise import NoiseSource, PerImageNoise, ReplayedNoise, global_noise
from .pndm import PLMS
from .predictor_corrector import PredictorCorrector
from .restart import Restart
from .unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "LMS",
    "PLMS",
    "Dopri5",
    "Euler",
    "EulerMaruyama",
    "FlowMap",
    "Heun",
    "MultistepDPMSolver",
    "NoiseSource",
    "Path",
    "PerImageNoise",
    "PredictorCorrector",
    "ReplayedNoise",
    "Restart",
    "Sampler",
    "SinglestepDPMSolver",
    "State",
    "UniPC",
    "Visit",
    "encode",
    "global_noise",
    "last_image",
    "renoise",
    "slerp",
]
