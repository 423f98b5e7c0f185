"""Every schedule x parameterisation x weighting x time sampling trains two steps or gives a one-line error."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from src.app import parts
from src.app.parts import codec_of, loss_of, source_of
from src.app.recipes import recipe_of
from src.errors import UserError
from src.generation.recipe import warn_of_amplified_errors, warn_of_missing_signal

CONF = Path(__file__).parents[2] / "conf"


def _choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


SCHEDULES, PARAMETERIZATIONS = _choices("schedule"), _choices("parameterization")
WEIGHTINGS, TIME_SAMPLINGS = _choices("weighting"), _choices("time_sampling")
# classifiers have no variance: tests/cli/test_guidance.py; those of few steps are in tests/diffusion/test_few_step.py,
# that of autoencoders in tests/cli/test_latents.py
OTHER_LOSSES = {
    "classification",
    "reconstruction",
    "mean_flow",
    "continuous_consistency",
    "shortcut",
    "consistency",
    "progressive",
    "contrastive",
}
LOSSES = [choice for choice in _choices("loss") if choice not in OTHER_LOSSES]
VARIANCES, DISTANCES = _choices("variance"), _choices("distance")
# these schedules end in pure noise, where eps and the score do not determine x0
REFUSED = set(itertools.product(("jsd", "rectified_flow", "zero_terminal_snr"), ("eps", "score")))
# the weighting equalises the losses on which the time sampling depends
UNFIT = ("learned_uncertainty", "importance")


@pytest.fixture(scope="module")
def composed():
    """Composes as the command line does; each choice is composed only once."""
    with initialize_config_dir(str(CONF), version_base=None):
        groups = {
            name: {choice: compose("train", [f"{name}={choice}"])[name] for choice in _choices(name)}
            for name in (
                "schedule",
                "parameterization",
                "weighting",
                "time_sampling",
                "loss",
                "variance",
                "distance",
            )
        }
        base = compose(
            "train", ["model.base_channels=8", "model.channel_multipliers=[1]", "model.attention_factors=[]"]
        )

    def make(**chosen):
        config = base.copy()
        for name, choice in chosen.items():
            config[name] = groups[name][choice]
        return config

    return make


class Pixelwise(nn.Module):
    """A fast replacement for the network: reads image and label and returns `out_channels` channels."""

    def __init__(self, out_channels):
        super().__init__()
        self.scale = nn.Parameter(torch.full((out_channels, 1, 1), 0.1))
        self.of_label = nn.Parameter(torch.zeros(()))

    def forward(self, x, label, condition=None):
        return self.scale * x + self.of_label * torch.tanh(label / 100).view(-1, 1, 1, 1)


def _train_two_steps(loss):
    """Takes two steps of Adam; every parameter must change, and all values must stay finite."""
    generator = torch.Generator().manual_seed(0)
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(2):
        x0 = torch.rand(4, 1, 2, 2, generator=generator) * 2 - 1
        draws = loss.draw(4, generator)
        losses = loss(x0, draws, torch.randn(x0.shape, generator=generator))
        assert losses.shape == (4,)
        assert losses.isfinite().all()
        optimizer.zero_grad()
        importance = loss.importance(draws)
        (losses if importance is None else losses * importance).mean().backward()
        optimizer.step()
    for old, parameter in zip(before, loss.parameters(), strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(old, parameter)


def denoiser_of(config):
    return parts.denoiser_of(config, codec_of(config, source_of(config)), None)


def _is_one_line(error):
    return "\n" not in str(error.value) and "choose" in str(error.value)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_matrix(schedule, parameterization, composed, record_property):
    kinds = list(itertools.product(WEIGHTINGS, TIME_SAMPLINGS))
    trained = 0
    config = composed(schedule=schedule, parameterization=parameterization)
    if (schedule, parameterization) in REFUSED:
        with pytest.raises(UserError, match=f"^parameterization={parameterization} ") as error:
            denoiser_of(config)
        assert _is_one_line(error)
        record_property("combinations that are refused", len(kinds))
        return
    denoiser = denoiser_of(config)
    for weighting, time_sampling in kinds:
        denoiser.network = Pixelwise(1)
        chosen = composed(
            schedule=schedule,
            parameterization=parameterization,
            weighting=weighting,
            time_sampling=time_sampling,
        )
        if (weighting, time_sampling) == UNFIT:
            with pytest.raises(UserError, match=r"^loss: time_sampling=importance ") as error:
                loss_of(chosen, denoiser)
            assert _is_one_line(error)
            continue
        _train_two_steps(loss_of(chosen, denoiser))
        trained += 1
    record_property("combinations that train", trained)
    record_property("combinations that are refused", len(kinds) - trained)


def test_matrix_is_complete():
    kinds = len(WEIGHTINGS) * len(TIME_SAMPLINGS)
    assert set(SCHEDULES) >= {schedule for schedule, _ in REFUSED}
    assert kinds > 1


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_variances(loss, variance, distance, composed):
    config = composed(loss=loss, variance=variance, distance=distance)
    learned = variance.startswith("learned")
    denoiser = denoiser_of(config)
    assert denoiser.network.out_channels == (2 if learned else 1)
    denoiser.network = Pixelwise(denoiser.network.out_channels)
    fits = {"denoising": not learned, "hybrid": learned, "vlb": distance == "squared"}[loss]
    if fits:
        _train_two_steps(loss_of(config, denoiser))
        return
    with pytest.raises(UserError, match=r"^(loss[.:]|distance has no effect)") as error:
        loss_of(config, denoiser)
    assert _is_one_line(error)


@pytest.mark.parametrize("schedule", ["vp", "edm", "rectified_flow"])
def test_learned_variance_needs_a_discrete_schedule(schedule, composed):
    config = composed(schedule=schedule, variance="learned_range", parameterization="v", loss="hybrid")
    with pytest.raises(UserError, match=r"^variance=learned .*choose variance=small") as error:
        denoiser_of(config)
    assert _is_one_line(error)


def test_a_learned_variance_needs_channels(composed):
    config = composed(variance="learned_range", loss="hybrid")
    config.model = {**config.model, "out_channels": 1}
    with pytest.raises(UserError, match=r"^model.out_channels=1: .* needs 2 output"):
        denoiser_of(config)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        # sqrt((1 - alphabar_T)/alphabar_T) of the cosine schedule, alphabar_T = 2.4288e-9
        (
            ["schedule=cosine", "clipping=none"],
            r"clipping=none: .* multiplies the network's errors by 20,291 in x0; choose clipping=static, or param",
        ),
        (["schedule=cosine", "clipping=static"], None),
        (["schedule=linear", "clipping=none"], None),
        (["schedule=cosine", "parameterization=v", "clipping=none"], None),
        # cos((901/1000 + 0.008)/1.008 pi/2) = 0.1537; DDPM's table has alphabar 0.00027 there
        (
            ["schedule=cosine", "spacing=leading", "sampler.steps=10"],
            r"spacing: .* at t = 901 of 1000, .* \(alpha 0.15, sigma 0.99\); choose spacing=trailing",
        ),
        (["schedule=cosine", "spacing=trailing", "sampler.steps=10"], None),
        (["schedule=linear", "spacing=leading", "sampler.steps=10"], None),
        (["schedule=edm", "spacing=karras", "parameterization=edm"], None),
        # sampling starts at the schedule's end: no other spacing starts at a higher noise level
        (["schedule=edm", "spacing=karras", "parameterization=edm", "schedule.sigma_max=5"], None),
    ],
)
def test_poor_start_of_sampling_is_warned_about(overrides, warning, caplog):
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", overrides)
    denoiser = denoiser_of(config)
    recipe = recipe_of(config, 0, denoiser, codec_of(config, source_of(config)), None)
    warn_of_amplified_errors(denoiser, recipe)
    warn_of_missing_signal(denoiser, recipe)
    if warning is None:
        assert caplog.text == ""
    else:
        assert re.search(warning, caplog.text)
