"""Guidance against its formulas on a mixture, whose conditional and unconditional predictions are known exactly."""

import pytest
import torch

from src.conditioning import NO_CLASS, Condition
from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import BaseDenoiser, Denoiser, wrapped
from src.diffusion.guidance import ClassifierFree
from src.diffusion.parameterization import X0, Eps, Prediction, V
from src.diffusion.sampler import DDIM, DDPM, Heun
from src.diffusion.schedule import EDM, VP, Cosine, RectifiedFlow
from src.diffusion.spacing import Karras, Trailing, UniformTime
from src.diffusion.variance import Small
from tests.diffusion.mixture import Mixture, three_modes
from tests.diffusion.sampler.networks import standard_normal

SCHEDULES = [Cosine(), VP(), EDM(), RectifiedFlow()]


class Exact(BaseDenoiser):
    """The exact denoiser of three modes, given which mode an image is of, or nothing."""

    def __init__(self, schedule, affine=False):
        super().__init__()
        self.schedule, self.variance, self.affine = schedule, Small(), affine
        self.whole = three_modes()
        self.batches = []
        one = torch.ones(1, dtype=torch.float64)
        self.modes = [
            Mixture(self.whole.means[k : k + 1], self.whole.variances[k : k + 1], one) for k in range(3)
        ]

    def forward(self, x_t, level, condition=None):
        self.batches.append(len(x_t))
        x0 = self.whole.posterior_mean(x_t, level)
        for k, mode in enumerate(self.modes):
            of_mode = condition.labels == k
            if of_mode.any():
                x0[of_mode] = mode.posterior_mean(x_t[of_mode], level)
        return Prediction(x_t, level, x0)


def inputs(n=6, schedule=None, seed=0):
    x_t = standard_normal((n, 1, 1, 2), seed).double()
    return x_t, Condition(labels=torch.arange(n) % 3)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_guided_score_is_the_formula_s(schedule, scale, batched):
    # score = (1 - w) score(x) + w score(x | class), score = (alpha x0 - x_t)/sigma^2; x0 from autograd of ln p
    denoiser = Exact(schedule)
    x_t, condition = inputs()
    level = schedule([0.5 * schedule.t_max if schedule.t_max <= 1000 else 500.0]).scalars()[0]

    def score(mixture, x):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(mixture.log_density(x, level).sum(), x)
        return gradient

    conditional = torch.cat(
        [score(denoiser.modes[k], x_t[i : i + 1]) for i, k in enumerate(condition.labels.tolist())]
    )
    expected = (1 - scale) * score(denoiser.whole, x_t) + scale * conditional
    prediction = ClassifierFree(denoiser, scale, batched=batched)(x_t, level, condition)
    torch.testing.assert_close(-prediction.eps / level.sigma, expected, rtol=1e-10, atol=1e-10)


def test_scale_1_is_the_conditional_denoiser_bit_for_bit_at_the_cost_of_one():
    denoiser = Exact(VP())
    x_t, condition = inputs()
    level = VP()([0.4]).scalars()[0]
    guided = ClassifierFree(denoiser, 1.0)(x_t, level, condition)
    assert torch.equal(guided.x0, denoiser(x_t, level, condition).x0)
    assert denoiser.batches == [6, 6]


def test_evaluations_are_counted_in_one_call_or_two():
    x_T, condition = inputs()
    times = UniformTime()(VP(), 5)
    for batched, batches in ((True, [12]), (False, [6, 6])):
        denoiser = Exact(VP())
        states = list(
            DDIM().trajectory(ClassifierFree(denoiser, 3.0, batched=batched), x_T, times, condition)
        )
        assert states[-1].evaluations == 10
        assert denoiser.batches == batches * 5


def test_the_interval_switches_guidance_by_noise_level():
    denoiser = Exact(EDM())
    guided = ClassifierFree(denoiser, 3.0, interval=(0.5, 2.0))
    x_t, condition = inputs()
    for sigma, active in ((0.4, False), (0.5, False), (0.6, True), (2.0, True), (2.1, False)):
        level = EDM()([sigma]).scalars()[0]
        conditional = denoiser(x_t, level, condition)
        everywhere = ClassifierFree(denoiser, 3.0)(x_t, level, condition)
        expected = everywhere if active else conditional
        assert torch.equal(guided(x_t, level, condition).x0, expected.x0)
        assert not torch.equal(everywhere.x0, conditional.x0)
    # evaluations: 2 within the interval, 1 outside
    times = Karras()(EDM(), 10)
    inside = sum(0.5 < t <= 2.0 for t in times.tolist())
    states = list(DDIM().trajectory(guided, 80 * x_t, times, condition))
    assert states[-1].evaluations == 10 + inside


class Network(torch.nn.Module):
    """Linear in the image, with a class bias and a spread that differs by class."""

    def forward(self, x, label, condition=None):
        k = condition.labels.view(-1, 1, 1, 1).to(x)
        return torch.where(k == NO_CLASS, 0.3 * x.sin() + 0.2, (0.5 + 0.2 * k) * x.cos() + 0.1 * k)


@pytest.mark.parametrize("parameterization", [Eps(), V(), X0()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_is_lin_et_al_s_on_the_network_s_output(parameterization, rescale):
    # their rescale_noise_cfg in numpy arithmetic, with the unbiased standard deviation of each image as in their code
    schedule = Cosine()
    x_t, condition = standard_normal((3, 1, 4, 4)).double(), Condition(labels=torch.arange(3))
    level = schedule([300.0]).scalars()[0]
    network = Network()
    conditional, weak = network(x_t, None, condition), network(x_t, None, condition.dropped())
    mixed = weak + 7.5 * (conditional - weak)
    ratio = conditional.flatten(1).std(dim=1) / mixed.flatten(1).std(dim=1)
    mixed = rescale * mixed * ratio.view(-1, 1, 1, 1) + (1 - rescale) * mixed
    expected = parameterization.predict(x_t, mixed, level)
    denoiser = Denoiser(network, schedule, parameterization)
    ours = ClassifierFree(denoiser, 7.5, rescale=rescale)(x_t, level, condition)
    torch.testing.assert_close(ours.x0, expected.x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.eps, expected.eps, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_output_equals_that_of_diffusers_guider(rescale):
    from diffusers.guiders import ClassifierFreeGuidance

    x_t, condition = standard_normal((3, 1, 4, 4)).double(), Condition(labels=torch.arange(3))
    network = Network()
    conditional, weak = network(x_t, None, condition), network(x_t, None, condition.dropped())
    guider = ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=rescale)
    guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(900))
    expected = guider.forward(conditional, weak).pred
    level = Cosine()([300.0]).scalars()[0]
    ours = ClassifierFree(Denoiser(network, Cosine(), Eps()), 5.0, rescale=rescale)(x_t, level, condition)
    torch.testing.assert_close(ours.output, expected)


@pytest.mark.parametrize("sampler", [DDIM(), DDPM(), Heun()], ids=lambda s: type(s).__name__)
def test_samplers_take_a_guided_and_clipped_denoiser(sampler):
    denoiser = Denoiser(Network(), Cosine(), V())
    guided = wrapped(denoiser, [lambda d: ClassifierFree(d, 4.0), StaticClipping])
    x_T, times = standard_normal((3, 1, 4, 4)), Trailing()(Cosine(), 6)
    images = sampler(guided, x_T, times, Condition(labels=torch.arange(3)))
    assert images.isfinite().all()


def test_scale_1_samples_the_class_and_more_moves_away_from_the_others():
    condition = Condition(labels=torch.zeros(400, dtype=torch.long))
    x_T, times = 80 * standard_normal((400, 1, 1, 2)).double(), Karras()(EDM(), 40)
    found = {}
    for scale in (1.0, 3.0):
        denoiser = Exact(EDM())
        found[scale] = Heun()(ClassifierFree(denoiser, scale), x_T, times, condition).flatten(1)
    mode = denoiser.modes[0]
    mean, std = found[1.0].mean(dim=0), found[1.0].std(dim=0)
    # within four standard errors
    torch.testing.assert_close(mean, mode.means[0].flatten(), rtol=0, atol=4 * (0.02 / 400) ** 0.5)
    torch.testing.assert_close(std, torch.full_like(std, 0.02**0.5), rtol=4 / (2 * 400) ** 0.5, atol=0)

    def distance_from_all(images):
        return (images.mean(dim=0) - denoiser.whole.mean.flatten()).norm()

    assert distance_from_all(found[3.0]) > distance_from_all(found[1.0]) + 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1.0}, "scale must be at least 0, got -1"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"interval": (float("nan"), 1.0)}, r"interval must be \[low, high\]"),
        ({"interval": (0.0, float("nan"))}, r"interval must be \[low, high\]"),
        ({"interval": (2.0, 1.0)}, r"interval must be \[low, high\]"),
        ({"rescale": 1.5}, r"rescale must be in \[0, 1\], got 1.5"),
    ],
)
def test_numbers_are_checked(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ClassifierFree(Exact(VP()), **{"scale": 2.0, **arguments})


def test_images_without_a_condition_are_refused():
    x_t, _ = inputs()
    with pytest.raises(ValueError, match=r"^guidance needs images with a condition"):
        ClassifierFree(Exact(VP()), 2.0)(x_t, VP()([0.4]).scalars()[0])
