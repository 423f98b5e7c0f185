"""A small network learns the flow map of a mixture in the plane by each loss: one step then gives its distribution."""

import pytest
import torch
from torch import nn

from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import ConsistencyLoss, DenoisingLoss, MeanFlowLoss, ProgressiveLoss, ShortcutLoss
from src.diffusion.parameterization import Velocity
from src.diffusion.sampler import DDIM, FlowMap
from src.diffusion.schedule import RectifiedFlow
from src.diffusion.spacing import Trailing
from src.diffusion.time_sampling import Uniform
from src.diffusion.weighting import Simple
from tests.diffusion.mixture import three_modes

MIXTURE, SCHEDULE = three_modes(), RectifiedFlow(label_scale=1.0)


class Perceptron(nn.Module):
    """Of an image of two pixels, and of one or two times."""

    def __init__(self, second_time):
        super().__init__()
        self.second_time = second_time
        self.layers = nn.Sequential(
            nn.Linear(4, 64),
            nn.SiLU(),
            nn.Linear(64, 64),
            nn.SiLU(),
            nn.Linear(64, 64),
            nn.SiLU(),
            nn.Linear(64, 2),
        )

    def forward(self, x, label, condition=None, to_label=None):
        times = torch.stack([label, label if to_label is None else to_label], dim=1)
        return self.layers(torch.cat([x.flatten(1), times.to(x.dtype)], dim=1)).view_as(x)


def untrained(second_time=False):
    torch.manual_seed(0)
    return Denoiser(Perceptron(second_time), SCHEDULE, Velocity())


def trained(loss, steps=1500):
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number in range(steps):
        x0, _ = MIXTURE.sample(256, draw)
        eps = torch.randn(x0.shape, generator=draw)
        optimizer.zero_grad()
        loss(x0.float(), loss.draw_at(number, 256, draw), eps).mean().backward()
        optimizer.step()
        decay.step()
    return loss.denoiser.eval().requires_grad_(False)


def distance(denoiser, sampler, steps):
    """The energy distance of 2,000 samples to 2,000 of the mixture: E|x-y| - E|x-x'|/2 - E|y-y'|/2."""
    draw = torch.Generator().manual_seed(1)
    x_T = torch.randn(2000, 1, 1, 2, generator=draw)
    noise = lambda x: torch.randn(x.shape, generator=draw)  # noqa: E731
    x = sampler(denoiser, x_T, Trailing()(SCHEDULE, steps), noise=noise).flatten(1)
    y = MIXTURE.sample(2000, draw)[0].float().flatten(1)
    return (torch.cdist(x, y).mean() - torch.cdist(x, x).mean() / 2 - torch.cdist(y, y).mean() / 2).item()


@pytest.fixture(scope="module")
def flow():
    """A trained flow: one step of it gives the mean of the data, 50 steps their distribution."""
    denoiser = trained(DenoisingLoss(untrained(), Simple(), Uniform()))
    denoiser.identity = "flow"
    assert distance(denoiser, DDIM(), 1) > 0.1
    assert distance(denoiser, DDIM(), 50) < 0.01
    return denoiser


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda flow: MeanFlowLoss(untrained(True), Uniform(), share=0.5, power=0.0),
        lambda flow: MeanFlowLoss(untrained(True), Uniform(), share=0.5, tangent="network"),
        lambda flow: ShortcutLoss(untrained(True), Uniform(), share=0.5, steps=16),
        lambda flow: ConsistencyLoss(untrained(), Uniform(), stages=6, every=200),
        lambda flow: ConsistencyLoss(untrained(), Uniform(), flow, stages=6, every=200),
    ],
    ids=["mean_flow", "improved_mean_flow", "shortcut", "consistency", "consistency_distillation"],
)
def test_one_step_gives_the_distribution(make, flow):
    denoiser = trained(make(flow))
    one, two = (distance(denoiser, FlowMap(1.0 if steps > 1 else 0.0), steps) for steps in (1, 2))
    print(
        f"one step {one:.4f}, two with new noise {two:.4f}, flow in one step {distance(flow, DDIM(), 1):.4f}"
    )
    assert one < 0.03


@pytest.mark.slow
def test_progressive_distillation_from_eight_steps_to_one(flow):
    for steps in (8, 4, 2, 1):
        student = untrained()
        student.network.load_state_dict(flow.network.state_dict())
        flow = trained(ProgressiveLoss(student, Simple(), Trailing(), flow, steps), 400)
        flow.identity = f"{steps} steps"
    print(f"one step {distance(flow, DDIM(), 1):.4f}")
    assert distance(flow, DDIM(), 1) < 0.03
