"""Autoguidance, projected guidance and guidance by a classifier: their formulas on mixtures, and what they sample."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from src.conditioning import NO_CLASS, Condition
from src.diffusion.classifier import NoiseClassifier
from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import Conditioned, Denoiser
from src.diffusion.guidance import AutoGuidance, ClassifierFree, ClassifierGuidance, Projected
from src.diffusion.parameterization import EDM as EDMParameterization
from src.diffusion.parameterization import X0, Eps, V
from src.diffusion.sampler import DDIM, DDPM, Heun
from src.diffusion.schedule import EDM, VE, VP, Cosine, RectifiedFlow
from src.diffusion.spacing import Karras, Trailing, UniformTime
from src.diffusion.variance import Large, Small
from tests.diffusion.mixture import Mixture, MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import standard_normal
from tests.diffusion.test_guidance import SCHEDULES, Exact, Network, inputs

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def smoothed(amount=0.1):
    """The three modes, blurred: what a weak model of them gives."""
    whole = three_modes()
    return Mixture(whole.means, whole.variances + amount, whole.weights)


def middle(schedule):
    return schedule([0.5 * schedule.t_max if schedule.t_max <= 1000 else 500.0]).scalars()[0]


def score_of(mixture, x_t, level):
    x = x_t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, level).sum(), x)
    return gradient


class ExactClassifier(torch.nn.Module):
    """ln p(k | x_t) of a mixture's components: Bayes' rule on the diffused densities."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.evaluated_images = mixture, 0

    def log_probability(self, x_t, level, labels):
        alpha, sigma2 = self.mixture._scales(x_t, level)
        joint = self.mixture._log_joint(x_t, alpha, sigma2)
        return joint.log_softmax(dim=1).gather(1, labels[:, None])

    def gradient(self, x_t, level, labels):
        self.evaluated_images += len(x_t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_probability(x, level, labels).sum(), x)
        return gradient


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_autoguidance_is_the_formula_s(schedule, scale):
    # Karras et al. 2024, eq. 4, for the score; unconditional
    strong, weak = MixtureDenoiser(three_modes(), schedule), MixtureDenoiser(smoothed(), schedule)
    x_t, level = inputs()[0], middle(schedule)
    expected = (1 - scale) * score_of(weak.mixture, x_t, level) + scale * score_of(strong.mixture, x_t, level)
    prediction = AutoGuidance(strong, weak, scale)(x_t, level)
    torch.testing.assert_close(-prediction.eps / level.sigma, expected, **EXACT)


def test_autoguidance_gives_both_the_condition_and_counts_both():
    strong, weak = Exact(EDM()), Exact(EDM())
    x_t, condition = inputs()
    guided = AutoGuidance(strong, weak, 3.0, interval=(0.5, 2.0))
    times = Karras()(EDM(), 10)
    inside = sum(0.5 < t <= 2.0 for t in times.tolist())
    assert 0 < inside < 10
    states = list(DDIM().trajectory(guided, 80 * x_t, times, condition))
    assert states[-1].evaluations == 10 + inside
    assert sum(weak.batches) == 6 * inside
    level = EDM()([0.4]).scalars()[0]
    assert torch.equal(guided(x_t, level, condition).x0, strong(x_t, level, condition).x0)
    # equal networks are their own guide, with any scale
    level = EDM()([1.0]).scalars()[0]
    torch.testing.assert_close(guided(x_t, level, condition).x0, strong(x_t, level, condition).x0, **EXACT)


@pytest.mark.parametrize("theirs", [Eps(), V(), X0(), EDMParameterization()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_weak_run_may_have_another_parameterization(theirs, rescale):
    x_t, condition = standard_normal((3, 1, 4, 4)).double(), Condition(labels=torch.arange(3))
    level = Cosine()([300.0]).scalars()[0]
    strong = Denoiser(Network(), Cosine(), V())
    weak = Conditioned(Denoiser(Network(), Cosine(), theirs), condition.dropped())
    ours = AutoGuidance(strong, weak, 3.0, rescale=rescale)(x_t, level, condition)
    # in terms of v = alpha eps - sigma x0
    v, v_weak = (
        level.alpha * p.eps - level.sigma * p.x0
        for p in (strong(x_t, level, condition), weak(x_t, level, condition))
    )
    mixed = v_weak + 3 * (v - v_weak)
    ratio = (v.flatten(1).std(dim=1) / mixed.flatten(1).std(dim=1)).view(-1, 1, 1, 1)
    mixed = rescale * mixed * ratio + (1 - rescale) * mixed
    torch.testing.assert_close(level.alpha * ours.eps - level.sigma * ours.x0, mixed, **EXACT)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_autoguidance_equals_that_of_diffusers_guider(rescale):
    # theirs makes the weak network by skipping layers; the combination is the same
    from diffusers.guiders import AutoGuidance as Theirs

    x_t, condition = standard_normal((3, 1, 4, 4)).double(), Condition(labels=torch.arange(3))
    level = Cosine()([300.0]).scalars()[0]
    denoiser = Denoiser(Network(), Cosine(), Eps())
    weak = Conditioned(denoiser, condition.dropped())
    guider = Theirs(guidance_scale=2.5, auto_guidance_layers=0, dropout=1.0, guidance_rescale=rescale)
    guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(900))
    expected = guider.forward(denoiser(x_t, level, condition).output, weak(x_t, level).output).pred
    ours = AutoGuidance(denoiser, weak, 2.5, rescale=rescale)(x_t, level, condition)
    torch.testing.assert_close(ours.output, expected, rtol=1e-5, atol=1e-5)


def test_the_first_evaluation_does_not_dominate_later_ones():
    # at the first of 5 steps, an eps network on this schedule has a gain of 20,000 in x0
    schedule, (x_t, condition) = (
        Cosine(),
        (standard_normal((3, 1, 4, 4)).double(), Condition(labels=torch.arange(3))),
    )
    denoiser = Denoiser(Network(), schedule, Eps())
    first, second = schedule(Trailing()(schedule, 5)[:2]).scalars()
    guided, fresh = (Projected(denoiser, 7.5, momentum=-0.5) for _ in range(2))
    assert (guided(x_t, first, condition).x0 - denoiser(x_t, first, condition).x0).abs().max() > 1000
    alone = fresh(x_t, second, condition).x0
    carried = guided(x_t, second, condition).x0 - alone
    assert 0 < carried.norm() < (alone - denoiser(x_t, second, condition).x0).norm()


def projected_update(x0, weak, before, eta, threshold, momentum):
    """Alg. 1 of Sadat et al. for one image, in numpy: the update that is multiplied by scale - 1, and the average."""
    d = x0 - weak + (0 if before is None else momentum * before)
    average = d
    if threshold is not None:
        d = d * min(1.0, threshold / np.linalg.norm(d))
    unit = x0 / np.linalg.norm(x0)
    parallel = (d * unit).sum() * unit
    return (d - parallel) + eta * parallel, average


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("eta", "threshold", "momentum"), [(0.0, None, 0.0), (0.3, 0.1, 0.0), (0.0, 0.15, -0.5), (0.5, None, 0.4)]
)
def test_projected_guidance_is_the_formula_s(schedule, eta, threshold, momentum):
    denoiser = Exact(schedule)
    guided = Projected(denoiser, 4.0, eta, threshold, momentum)
    x_t, condition = inputs()
    averages = [None] * len(x_t)
    t = 0.5 * schedule.t_max if schedule.t_max <= 1000 else 500.0
    for level in schedule([t, 0.9 * t, 0.6 * t]).scalars():
        x0 = denoiser(x_t, level, condition).x0.flatten(1).numpy()
        weak = denoiser(x_t, level, condition.dropped()).x0.flatten(1).numpy()
        expected = np.empty_like(x0)
        for i in range(len(x0)):
            update, averages[i] = projected_update(x0[i], weak[i], averages[i], eta, threshold, momentum)
            expected[i] = x0[i] + 3 * update
        found = guided(x_t, level, condition)
        expected = torch.from_numpy(expected).view_as(x_t)
        torch.testing.assert_close(found.x0, expected, **EXACT)
        torch.testing.assert_close(found.eps, (x_t - level.alpha * expected) / level.sigma, **EXACT)


def test_projected_guidance_with_everything_kept_is_classifier_free():
    x_t, condition = inputs()
    level = VP()([0.4]).scalars()[0]
    plain = ClassifierFree(Exact(VP()), 4.0)(x_t, level, condition)
    kept = Projected(Exact(VP()), 4.0, eta=1.0)(x_t, level, condition)
    torch.testing.assert_close(kept.x0, plain.x0, **EXACT)
    # orthogonal to the conditional x0 otherwise
    x0 = Exact(VP())(x_t, level, condition).x0
    moved = Projected(Exact(VP()), 4.0)(x_t, level, condition).x0 - x0
    torch.testing.assert_close((moved * x0).flatten(1).sum(dim=1), torch.zeros(6).double(), **EXACT)


@pytest.mark.parametrize(
    ("eta", "threshold", "momentum"), [(1.0, 2.0, -0.5), (0.0, 3.0, -0.75), (0.2, 100.0, 0.3)]
)
def test_projected_guidance_equals_that_of_diffusers_guider(eta, threshold, momentum):
    # theirs acts on whatever the network predicts; with x0 and the paper's w - 1, both are the paper's
    from diffusers.guiders import AdaptiveProjectedGuidance

    guider = AdaptiveProjectedGuidance(
        guidance_scale=5.0 - 1,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=threshold,
        eta=eta,
        use_original_formulation=True,
    )
    x_t, condition = standard_normal((3, 1, 4, 4)), Condition(labels=torch.arange(3))
    denoiser = Denoiser(Network(), Cosine(), X0())
    ours = Projected(denoiser, 5.0, eta, threshold, momentum)
    for step, level in enumerate(Cosine()([700.0, 500.0, 300.0]).scalars()):
        guider.set_state(step=step, num_inference_steps=3, timestep=torch.tensor(900))
        guider.prepare_inputs({"x": (x_t, x_t)})  # makes its average
        strong, weak = (denoiser(x_t, level, c).x0 for c in (condition, condition.dropped()))
        torch.testing.assert_close(
            ours(x_t, level, condition).x0, guider.forward(strong, weak).pred, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("sampler", [DDIM(), Heun(), DDPM()], ids=lambda s: type(s).__name__)
def test_momentum_depends_on_neither_the_batch_nor_an_earlier_run(sampler):
    guided = Projected(Exact(EDM()), 4.0, momentum=-0.5)
    x_T, condition = inputs()
    times = Karras()(EDM(), 6)

    def images(indices):
        noise = [torch.Generator().manual_seed(i) for i in indices]

        def draw(x):
            return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in noise])

        return sampler(guided, 80 * x_T[indices], times, condition.index(indices), draw)

    together = images([0, 1, 2, 3, 4, 5])
    assert torch.equal(images([0, 1, 2, 3, 4, 5]), together)
    torch.testing.assert_close(torch.cat([images([0, 1]), images([2, 3, 4, 5])]), together, **EXACT)
    without = sampler(Projected(Exact(EDM()), 4.0), 80 * x_T, times, condition, lambda x: torch.zeros_like(x))
    with_momentum = sampler(guided, 80 * x_T, times, condition, lambda x: torch.zeros_like(x))
    assert (without - with_momentum).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("schedule", [*SCHEDULES, VE()], ids=lambda s: type(s).__name__)
def test_guidance_by_the_exact_classifier_is_the_formula_s(schedule, scale):
    # alg. 2, and for scale 1 Bayes' rule: score(x) + grad ln p(k | x) = score(x | k)
    whole = three_modes()
    x_t, condition = inputs()
    level = middle(schedule)
    classifier = ExactClassifier(whole)
    prediction = ClassifierGuidance(MixtureDenoiser(whole, schedule), classifier, scale)(
        x_t, level, condition
    )
    of_class = torch.cat(
        [score_of(Exact(schedule).modes[k], x_t[i : i + 1], level) for i, k in enumerate(condition.labels)]
    )
    score = score_of(whole, x_t, level)
    expected = score + scale * (of_class - score)
    torch.testing.assert_close(-prediction.eps / level.sigma, expected, **EXACT)
    torch.testing.assert_close(level.alpha * prediction.x0 + level.sigma * prediction.eps, x_t, **EXACT)
    if scale == 1:
        torch.testing.assert_close(prediction.x0, Exact(schedule)(x_t, level, condition).x0, **EXACT)


@pytest.mark.parametrize("variance", [Small(), Large()], ids=lambda v: type(v).__name__)
def test_ancestral_guidance_moves_the_mean(variance):
    # alg. 1: mean + scale variance grad, with the variance of the unguided step; x0 is clipped before
    whole, schedule = three_modes(), Cosine()
    x_t, condition = inputs()
    t, s = schedule([500.0, 400.0]).scalars()
    classifier = ExactClassifier(whole)
    inner = StaticClipping(MixtureDenoiser(whole, schedule, variance), bound=0.3)
    found = ClassifierGuidance(inner, classifier, 2.0).reverse(x_t, t, s, condition)
    plain = inner.reverse(x_t, t, s)
    x = x_t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier.log_probability(x, t, condition.labels).sum(), x)
    assert found.variance == plain.variance == variance(t, s, None)
    torch.testing.assert_close(found.mean, plain.mean + 2 * plain.variance * gradient, **EXACT)


def overlapping():
    """Two classes on a line that overlap by a third, so that the strength of guidance shows."""
    return Mixture(
        torch.tensor([[0.4], [-0.4]]).double().view(2, 1, 1, 1),
        torch.tensor([0.1, 0.1]).double(),
        torch.tensor([0.5, 0.5]).double(),
    )


CHAINS = {
    "ode": (EDM(), Heun(), Karras(), 30),
    "ancestral": (VP(), DDPM(), UniformTime(), 150),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("scale", [0.7, 1.0, 1.3])
def test_scale_1_samples_the_conditional_distribution(chain, scale):
    schedule, sampler, spacing, steps = CHAINS[chain]
    whole, n = overlapping(), 4000
    guided = ClassifierGuidance(MixtureDenoiser(whole, schedule, Large()), ExactClassifier(whole), scale)
    times = spacing(schedule, steps)
    random = torch.Generator().manual_seed(0)

    def noise(x):
        return torch.randn(x.shape, generator=random, dtype=torch.float64)

    x_T = schedule(times[:1]).scalars()[0].sigma * noise(torch.empty(n, 1, 1, 1))
    images = sampler(guided, x_T, times, Condition(labels=torch.zeros(n, dtype=torch.long)), noise)
    p_value = kstest(images.flatten().numpy(), "norm", args=(0.4, math.sqrt(0.1))).pvalue
    assert p_value > 0.01 if scale == 1 else p_value < 1e-6


def test_a_classifier_is_evaluated_once_a_step_and_only_where_it_guides():
    whole = three_modes()
    x_T, condition = inputs()
    times = Karras()(EDM(), 10)
    for interval, guided_steps in ((None, 10), ((0.5, 2.0), sum(0.5 < t <= 2.0 for t in times.tolist()))):
        denoiser = MixtureDenoiser(whole, EDM())
        guided = ClassifierGuidance(denoiser, ExactClassifier(whole), 1.0, interval)
        for sampler in (DDIM(), DDPM()):
            last = list(sampler.trajectory(guided, 80 * x_T, times, condition))[-1]
            assert last.evaluations == 10 + guided_steps
    states = list(
        DDIM().trajectory(
            ClassifierGuidance(denoiser, ExactClassifier(whole), 0.0), 80 * x_T, times, condition
        )
    )
    assert states[-1].evaluations == 10


def test_pure_noise_is_not_guided():
    denoiser = MixtureDenoiser(three_modes(), RectifiedFlow())
    guided = ClassifierGuidance(denoiser, ExactClassifier(three_modes()), 2.0)
    x_T, condition = inputs()
    level = RectifiedFlow()([1.0]).scalars()[0]
    assert level.alpha == 0
    assert torch.equal(guided(x_T, level, condition).x0, denoiser(x_T, level).x0)
    assert DDIM()(guided, x_T, UniformTime()(RectifiedFlow(), 5), condition).isfinite().all()


class Logits(torch.nn.Module):
    """Logits that depend on the scaled image and on the label."""

    def forward(self, x, label, condition=None):
        assert condition is None
        features = torch.stack([x.sin(), x.cos(), x], dim=1).flatten(2).sum(dim=2)
        return features * (1 + label[:, None] / 1000)


def test_the_gradient_of_a_network_is_that_of_its_log_probability():
    classifier = NoiseClassifier(Logits().double(), VE(), Eps())
    x_t, labels = standard_normal((4, 1, 2, 2)).double(), torch.tensor([0, 2, NO_CLASS, 1])
    level = VE()([0.5 * VE().t_max]).scalars()[0]
    x_t = x_t * level.sigma
    with torch.no_grad():
        found = classifier.gradient(x_t, level, labels)
    assert not found.requires_grad
    assert (found[2] == 0).all(), "an image without a class is not guided"
    for i in (0, 1, 3):
        for pixel in range(4):
            moved = torch.zeros(4).double()
            moved[pixel] = h = 1e-4 * level.sigma
            ahead, behind = (
                classifier.logits(x_t[i : i + 1] + sign * moved.view(1, 1, 2, 2), level).log_softmax(dim=1)
                for sign in (1, -1)
            )
            expected = (ahead - behind)[0, labels[i]] / (2 * h)
            assert found[i].flatten()[pixel].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)
    # a norm of 1 at the network, on any schedule
    norm = math.hypot(level.alpha, level.sigma)
    direct = Logits()(x_t / norm, torch.full((4,), level.label))
    torch.testing.assert_close(classifier.logits(x_t, level), direct)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: Projected(d, 0.5), "scale must be at least 1, got 0.5"),
        (lambda d: Projected(d, 2.0, threshold=0.0), "threshold must be positive"),
        (lambda d: Projected(d, 2.0, threshold=math.nan), "threshold must be positive"),
        (lambda d: Projected(d, 2.0, eta=math.nan), "eta must be finite"),
        (lambda d: Projected(d, 2.0, momentum=math.nan), "momentum must be in"),
        (lambda d: AutoGuidance(d, d, math.nan), "scale must be finite, got nan"),
        (lambda d: ClassifierGuidance(d, None, math.inf), "scale must be finite, got inf"),
        (lambda d: Projected(d, 2.0, momentum=1.0), r"momentum must be in \(-1, 1\)"),
        (lambda d: AutoGuidance(d, d, -1.0), "scale must be at least 0"),
        (lambda d: AutoGuidance(d, d, 2.0, rescale=2.0), "rescale must be"),
        (lambda d: ClassifierGuidance(d, None, -1.0), "scale must be at least 0"),
        (lambda d: ClassifierGuidance(d, None, 1.0, (2.0, 1.0)), "interval must be"),
    ],
)
def test_numbers_are_checked(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(Exact(VP()))


def test_a_classifier_guides_images_with_a_class_only():
    guided = ClassifierGuidance(MixtureDenoiser(three_modes(), VP()), ExactClassifier(three_modes()), 1.0)
    with pytest.raises(ValueError, match="needs images with a class"):
        guided(inputs()[0], VP()([0.4]).scalars()[0])
