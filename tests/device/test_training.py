"""A training step runs on the device alone: no stray CPU tensor, no wait, and no float64 where there is none."""

from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from src.app.options import CONF
from src.training.ema import PowerEMA
from src.training.nonfinite import clip_or_skip
from tests.device.lane import lane
from tests.device.parts import BATCH, batch_on, choices, parts

# Choices that need another one; all others stand by themselves.
NEEDS = {
    "loss=hybrid": ["variance=learned_range"],
    "loss=classification": ["conditioning=class", "model=encoder_tiny"],
    "model=encoder_tiny": ["conditioning=class", "loss=classification"],
    "loss=mean_flow": ["schedule=rectified_flow", "model.second_time=true"],
    "loss=shortcut": ["schedule=rectified_flow", "model.second_time=true"],
    "loss=continuous_consistency": ["schedule=rectified_flow", "model.second_time=true"],
    "loss=consistency": ["schedule=rectified_flow"],
    "variance=learned": ["loss=vlb"],
    "variance=learned_range": ["loss=vlb"],
}
GROUPS = (
    "loss",
    "weighting",
    "distance",
    "time_sampling",
    "parameterization",
    "schedule",
    "variance",
)
# Defined on every schedule, those that end in pure noise too.
EVERYWHERE = "parameterization=v"
# Progressive distillation needs a second run: tests/training/test_few_step.py; an autoencoder has no condition
ELSEWHERE = ("progressive", "reconstruction")
CASES = [f"{group}={choice}" for group in GROUPS for choice in choices(group) if choice not in ELSEWHERE]
CASES += ["regularizer=dispersive", "augmentation=edm"]


@pytest.mark.parametrize("case", CASES)
def test_a_step_does_not_wait(case):
    module = parts(EVERYWHERE, case, *NEEDS.get(case, [])).module
    with lane(float64=False) as device:
        module.to("cuda")
        batch = batch_on("cuda")
        device.waits.clear()
        made = module.training_step(batch, 0)
        assert made["loss"].device.type == "cuda"
        assert made["loss"].dtype == torch.float32
        assert made["losses"].shape == (BATCH,)
        assert device.waits == []


def test_bytes_travel_and_are_mirrored_and_rescaled_on_the_device():
    module = parts().module
    with lane(float64=False) as device:
        flips = torch.ones(BATCH, dtype=torch.bool)
        batch = replace(batch_on("cpu"), flips=flips).to("cuda")
        assert (batch.images.dtype, batch.images.device.type) == (torch.uint8, "cuda")
        module.to("cuda")
        device.copies.clear()
        device.waits.clear()
        x0 = module.encode(batch)
        assert (x0.dtype, x0.device.type) == (torch.float32, "cuda")
        assert device.copies == device.waits == []


def test_backward_and_the_optimizer_do_not_wait():
    """On the meta device, which has no values either: autograd needs a driver for a CUDA tensor."""
    module = parts("loss=hybrid", "variance=learned_range").module
    with lane("meta", float64=False) as device:
        module.to("meta")
        batch = batch_on("meta")
        optimizer = torch.optim.Adam(module.parameters())
        device.waits.clear()
        module.training_step(batch, 0)["loss"].backward()
        assert all(parameter.grad.is_meta for parameter in module.parameters())
        optimizer.step()
        assert device.waits == []


@pytest.mark.parametrize("choice", [name for name in choices("ema") if name not in ("none", "schedule_free")])
def test_averaging_does_not_wait(choice):
    node = OmegaConf.load(CONF / "ema" / f"{choice}.yaml")
    ema = instantiate(OmegaConf.merge({"batch_size": BATCH}, {"ema": node}).ema)
    network = parts().module.denoiser.network
    with lane(float64=False) as device:
        network.to("cuda")
        device.waits.clear()
        ema.start(network)
        for ema.updates in range(3):
            ema.update(network, torch.ones((), dtype=torch.bool, device="cuda"))
        assert all(weight.device.type == "cuda" for weight in ema.weights.values())
        with ema.applied(network):
            pass
        assert device.waits == []


def test_averages_in_main_memory_wait_for_a_copy_of_the_weights():
    ema = PowerEMA(device="cpu")
    network = parts().module.denoiser.network
    with lane(float64=False) as device:
        network.to("cuda")
        ema.start(network)
        assert all(w.device.type == "cpu" for average in ema.averages for w in average.values())
        device.copies.clear()
        ema.update(network, torch.ones((), dtype=torch.bool, device="cuda"))
        assert len(device.copies) == len(list(network.parameters())) + 1, "one copy for all lengths"
        with ema.applied(network):
            assert all(weight.device.type == "cuda" for weight in network.parameters())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not-fused"])
def test_only_a_fused_optimizer_skips_without_waiting(fused):
    network = parts().module.denoiser.network
    with lane(float64=False, answers=True) as device:
        network.to("cuda")
        optimizer = torch.optim.Adam(network.parameters(), fused=fused)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        device.waits.clear()
        norm = clip_or_skip(optimizer, network.parameters(), limit=1.0)
        optimizer.step()
        assert norm.device.type == "cuda"
        assert len(device.waits) == (0 if fused else 1)


def test_validation_does_not_wait_in_its_losses():
    module = parts().module
    with lane(float64=False) as device:
        module.to("cuda")
        module.log_dict = lambda *_, **__: None
        batch = batch_on("cuda")
        device.waits.clear()
        module.validation_step(batch, 0)
        assert device.waits == []
