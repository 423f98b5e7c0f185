"""Trainings of few-step models: on two processes, resumed, distilled, in other precisions, compiled, and refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.app.automatic import settle
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import MeanFlowLoss
from src.diffusion.parameterization import Velocity
from src.diffusion.schedule import RectifiedFlow
from src.diffusion.time_sampling import Uniform
from src.model import UNet
from tests.cli.test_bad_input import assert_one_line
from tests.conftest import ROOT
from tests.test_conf import composed

SMALL = (
    "logger=csv",
    "trainer=cpu",
    "callbacks=checkpoints",
    "metrics=none",
    "batch_size=8",
    "model.base_channels=8",
    "model.groups=4",
    "validate_every=2",
    "+trainer.limit_val_batches=1",
)


class Step(nn.Module):
    """What Lightning makes of a training step: DDP calls `forward`, so the derivative is taken inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"base_channels": 8, "channel_multipliers": (1, 1), "blocks_per_level": 1, "groups": 4}
        network = UNet(8, 1, **sizes, second_time=True).double()
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        schedule = RectifiedFlow(label_scale=10.0)
        self.loss = MeanFlowLoss(Denoiser(network, schedule, Velocity()), Uniform(), share=0.5)

    def forward(self, *batch):
        return self.loss(*batch).mean()


def trained(rank: int, world_size: int, inside: bool) -> torch.Tensor:
    """All weights after three steps; with `inside` false, the derivative is taken of the module inside DDP."""
    step, draw = Step(), torch.Generator().manual_seed(0)
    distributed = DistributedDataParallel(step) if world_size > 1 else step
    called = distributed if inside else step
    optimizer = torch.optim.SGD(step.parameters(), 0.1)
    for _ in range(3):
        x0, eps = torch.randn(2, 8, 1, 8, 8, dtype=torch.float64, generator=draw)
        times = step.loss.draw(8, draw)
        batch = [part[rank * 8 // world_size : (rank + 1) * 8 // world_size] for part in (x0, times, eps)]
        optimizer.zero_grad()
        called(*batch).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in step.parameters()])


def one_process(rank: int, world_size: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.save([trained(rank, world_size, inside) for inside in (True, False)], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_and_a_derivative_past_ddp_does_not(tmp_path):
    torch.multiprocessing.spawn(one_process, args=(2, tmp_path), nprocs=2)
    alone = trained(0, 1, True)
    (first, naive), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert (first - alone).abs().max() < 1e-10
    assert (naive - other).abs().max() > 1e-4, "the ranks have the same weights"
    assert (naive - alone).abs().max() > 1e-4


@pytest.mark.slow
def test_two_processes_of_the_command_line_equal_one(tmp_path):
    weights = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        options = ["experiment=mean_flow_digits", *SMALL, "trainer.max_steps=4", "trainer.precision=32-true"]
        options += [f"trainer.devices={devices}", f"hydra.run.dir={folder}"]
        # a process of its own, since the second one is started with the command of the first
        subprocess.run([sys.executable, "-m", "src.train", *options], cwd=ROOT, check=True, timeout=300)
        weights.append(weights_of(folder, 4))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-6, atol=1e-6)


def weights_of(folder, step):
    return torch.load(folder / "checkpoints" / f"step_{step:08d}.ckpt")["state_dict"]


RESUMED = {
    "mean_flow": ["experiment=mean_flow_digits"],
    "improved_mean_flow": ["experiment=mean_flow_digits", "loss.tangent=network"],
    "continuous_consistency": ["experiment=mean_flow_digits", "loss=continuous_consistency"],
    "shortcut": ["experiment=shortcut_digits"],
    "contrastive": ["experiment=rectified_flow_digits", "loss=contrastive"],
    "consistency": ["experiment=consistency_digits", "loss.every=2"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "consistency" else pytest.mark.slow) for name in RESUMED]
)
def test_a_resumed_training_is_the_same_bit_for_bit(name, command, tmp_path):
    options = ["conditioning=class", "conditioning.dropout=0.2", "model.dropout=0.1"]
    if name != "contrastive":  # docs/few_step.md offers it without a coupling
        options.append("coupling=optimal_transport_per_class")
    assert_resumes(command, tmp_path, [*RESUMED[name], *SMALL, *options])


def assert_resumes(command, folder, options):
    """Compares four steps with two and two."""
    for name, steps in (("whole", 4), ("half", 2)):
        assert command("train", *options, f"trainer.max_steps={steps}", f"hydra.run.dir={folder / name}") == 0
    assert command("train", f"ckpt={folder / 'half'}", "trainer.max_steps=4", "logger=csv") == 0
    whole, half = (weights_of(folder / name, 4) for name in ("whole", "half"))
    for key, weight in whole.items():
        if torch.is_tensor(weight):
            assert torch.equal(weight, half[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [["loss=progressive", "sampler.steps=4"], ["loss=consistency", "sampler=consistency"]]
)
def test_a_student_that_starts_from_its_teacher_resumes_bit_for_bit(method, command, tmp_path):
    teacher = tmp_path / "teacher"
    flow = ["experiment=rectified_flow_digits", *SMALL]
    assert command("train", *flow, "trainer.max_steps=2", f"hydra.run.dir={teacher}") == 0
    assert_resumes(command, tmp_path, [*flow, *method, f"loss.run={teacher}", f"init={teacher}"])


@pytest.mark.slow
def test_distillation_from_a_run(command, tmp_path, capfd):
    """Progressive and consistency distillation; a teacher that does not fit, or has changed, is refused."""
    teacher = tmp_path / "teacher"
    flow = ["experiment=rectified_flow_digits", *SMALL, "trainer.max_steps=2"]
    assert command("train", *flow, f"hydra.run.dir={teacher}") == 0
    progressive = [*flow, f"loss.run={teacher}", "sampler=ddim", "sampler.steps=4", "loss=progressive"]
    assert command("train", *progressive, f"hydra.run.dir={tmp_path / 'progressive'}") == 0
    consistency = [*flow, f"loss.run={teacher}", "loss=consistency", "sampler=consistency"]
    assert command("train", *consistency, f"hydra.run.dir={tmp_path / 'consistency'}") == 0
    state = weights_of(tmp_path / "consistency", 2)
    identity = bytes(state["loss._extra_state"]["teacher"].tolist()).decode()
    assert identity.startswith("run(checkpoint=")
    assert not any("teacher" in key for key in state)
    # the distilled run is sampled without its teacher
    (teacher / "checkpoints").rename(tmp_path / "moved")
    for name in ("progressive", "consistency"):
        out = tmp_path / f"{name}_images"
        assert command("sample", f"run={tmp_path / name}", "n=2", f"out={out}", "sampler.steps=2") == 0
    (tmp_path / "moved").rename(teacher / "checkpoints")
    # another teacher at the same place
    assert command("train", f"ckpt={teacher}", "trainer.max_steps=4", "logger=csv") == 0
    capfd.readouterr()
    assert command("train", f"ckpt={tmp_path / 'consistency'}", "trainer.max_steps=4", "logger=csv") == 2
    assert_one_line(capfd.readouterr().err, ["loss.run: this training began with the teacher run("])
    for changes, words in (
        (["schedule=edm", "parameterization=edm"], "it was trained on the schedule RectifiedFlow"),
        (["conditioning=class"], "it is unconditional, and this training is conditioned on labels"),
        (["loss.run=null"], "loss.run is missing"),
        (["sampler.steps=3", "spacing=uniform_time"], "spacing: the times of 3 steps of UniformTime"),
    ):
        assert command("train", *progressive, *changes) == 2
        assert_one_line(capfd.readouterr().err, [words])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["model.second_time=false"],
            "model.second_time=false: loss=mean_flow needs a network that is given both",
        ),
        (
            ["schedule=cosine", "parameterization=v", "~schedule.label_scale"],
            "schedule: loss=mean_flow needs continuous times",
        ),
        (
            ["schedule=vp", "~schedule.label_scale"],
            "schedule: loss=mean_flow is defined for x_t on a straight line",
        ),
        (
            ["schedule=edm", "~schedule.label_scale"],
            "parameterization: the label of t = 0 on EDM is not finite",
        ),
        (
            ["time_sampling=importance", "~time_sampling.mean", "~time_sampling.std"],
            "time_sampling=importance is for losses of one time",
        ),
        (["weighting=min_snr"], "weighting has no effect on this loss"),
        (["sampler.steps=2", "clipping=static"], "clipping: with sampler=flow_map in several steps"),
        (
            ["loss=consistency", "~loss.share", "~loss.power", "parameterization=x0"],
            "parameterization: loss=consistency needs x0 = x_t at t = 0",
        ),
        (
            ["loss=consistency", "~loss.share", "~loss.power", "model.second_time=false", "sampler.steps=2"],
            "sampler.gamma=0: this network has no second time",
        ),
        (["loss=shortcut", "loss.steps=100"], "loss.steps must be a power of 2"),
        (
            ["conditioning=class", "conditioning.dropout=0.1", "guidance=classifier_free"],
            "guidance: sampler=flow_map makes steps of the average velocity",
        ),
        (
            ["model=dit_tiny", "model.second_time=true", "+model.checkpointing=true"],
            "model.checkpointing=true: recomputed activations have no forward-mode derivative",
        ),
        (
            ["coupling=optimal_transport_per_class"],
            "coupling.per_class=true needs a network that is conditioned",
        ),
        (
            ["coupling=optimal_transport", "conditioning=class"],
            "coupling=optimal_transport makes the noise depend on the condition",
        ),
        (["compile=true"], "compile=true: a compiled network has no forward-mode derivative"),
    ],
)
def test_what_does_not_fit_is_one_line(options, words, command, capfd):
    assert command("train", "experiment=mean_flow_digits", *SMALL[:4], *options) == 2
    assert_one_line(capfd.readouterr().err, [words])


def test_auto_does_not_compile_what_is_derived(monkeypatch):
    config = composed("train", "experiment=mean_flow_digits", "compile=auto", "trainer.accelerator=gpu")
    monkeypatch.setattr("src.app.automatic.device_of", lambda config: "cuda")
    assert settle(config) == ["compile     false: this loss takes a forward-mode derivative"]
    assert config.compile is False


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(precision, command, tmp_path):
    options = ["experiment=mean_flow_digits", *SMALL, f"trainer.precision={precision}", "trainer.max_steps=2"]
    assert command("train", *options, f"hydra.run.dir={tmp_path / 'run'}") == 0
    weights = weights_of(tmp_path / "run", 2)
    assert all(weight.isfinite().all() for weight in weights.values() if torch.is_tensor(weight))
