"""Targets of few-step losses with the exact average velocity of a mixture, and the derivative in forward mode."""

import math

import pytest
import torch
from scipy.stats import kstest
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.conditioning import Condition
from src.diffusion.denoiser import Denoiser
from src.diffusion.flow_map import FlowMap
from src.diffusion.loss import (
    ConsistencyLoss,
    ContinuousConsistencyLoss,
    MeanFlowLoss,
    ProgressiveLoss,
    ShortcutLoss,
)
from src.diffusion.loss.distillation import implied_x0
from src.diffusion.loss.few_step import moving
from src.diffusion.noise_level import NoiseLevel
from src.diffusion.parameterization import EDM, V, Velocity
from src.diffusion.sampler import FlowMap as FlowMapSampler
from src.diffusion.schedule import EDM as EDMSchedule
from src.diffusion.schedule import Cosine, RectifiedFlow
from src.diffusion.spacing import Leading, Trailing
from src.diffusion.time_sampling import Importance, Uniform
from src.diffusion.weighting import Simple
from src.errors import UserError
from src.model import UNet
from tests.diffusion.flows import ExactFlowMap, marginal_velocity, solve
from tests.diffusion.mixture import Mixture, Posterior, three_modes

N = 8
MIXTURE = three_modes()


def draws(n=N, seed=0, low=0.05):
    """Points of the flow with times t > s in [low, 1], and the exact velocity there."""
    generator = torch.Generator().manual_seed(seed)
    times = low + (1 - low) * torch.rand(n, 2, dtype=torch.float64, generator=generator)
    t, s = times.amax(dim=1), times.amin(dim=1)
    x0, _ = MIXTURE.sample(n, generator)
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    x_t = (1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * eps
    return x0, eps, x_t, t, s


def mean_flow(**options):
    return MeanFlowLoss(ExactFlowMap(MIXTURE, steps=40), Uniform(), **options)


def test_the_exact_flow_is_exact():
    """Its map of one Gaussian has a closed form, the maps compose, and u(t, t) is the limit of u(t, s)."""
    _x0, _eps, x_t, t, s = draws()
    one = Mixture(MIXTURE.means[:1], MIXTURE.variances[:1], torch.ones(1, dtype=torch.float64))

    def scale(time):
        return ((1 - time) ** 2 * one.variances + time**2).sqrt()

    def mean(time):
        return (1 - time).view(-1, 1, 1, 1) * one.means

    ratio = (scale(s) / scale(t)).view(-1, 1, 1, 1)
    torch.testing.assert_close(solve(one, x_t, t, s), mean(s) + ratio * (x_t - mean(t)), rtol=1e-9, atol=1e-9)
    m = (t + s) / 2
    twice = solve(MIXTURE, solve(MIXTURE, x_t, t, m), m, s)
    torch.testing.assert_close(twice, solve(MIXTURE, x_t, t, s), rtol=1e-7, atol=1e-7)
    flow = ExactFlowMap(MIXTURE)
    torch.testing.assert_close(flow.u(x_t, t, t - 1e-6), flow.u(x_t, t, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tangent", ["data", "network"])
def test_mean_flow_with_the_marginal_velocity_is_a_fixed_point(tangent):
    _, _, x_t, t, s = draws()
    v = marginal_velocity(MIXTURE, x_t, t)
    u, target = mean_flow(tangent=tangent).pair(x_t, t, s, v, None)
    torch.testing.assert_close(target, u, rtol=1e-6, atol=1e-6)
    wrong = mean_flow(tangent=tangent).pair(x_t, t, s, 1.01 * v, None)[1]
    assert (wrong - u).abs().max() > 1e-3


@pytest.mark.parametrize("tangent", ["data", "network"])
def test_mean_flow_with_the_velocity_of_the_data_is_a_fixed_point_in_the_mean(tangent):
    """Over x0 and eps given x_t: the expected gradient of the squared error is zero."""
    _, _, x_t, t, s = draws(1, seed=3)
    generator = torch.Generator().manual_seed(0)
    alpha, sigma = (1 - t).item(), t.item()
    posterior = Posterior(MIXTURE, alpha * torch.eye(2, dtype=torch.float64), x_t.flatten(), sigma)
    x0 = posterior.sample(400, generator)
    v = (x_t - x0) / sigma  # eps - x0, with eps = (x_t - alpha x0) / sigma
    loss = mean_flow(tangent=tangent)
    u, targets = loss.pair(x_t.repeat(400, 1, 1, 1), t.repeat(400), s.repeat(400), v, None)
    # the target is affine in v ...
    of_mean = loss.pair(x_t, t, s, v.mean(dim=0, keepdim=True), None)[1]
    torch.testing.assert_close(targets.mean(dim=0, keepdim=True), of_mean, rtol=1e-9, atol=1e-9)
    assert targets.std(dim=0).min() > 0.01
    # ... and the mean of v is the marginal velocity, with which the target is u
    marginal = marginal_velocity(MIXTURE, x_t, t)
    torch.testing.assert_close((x_t - posterior.mean) / sigma, marginal, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.pair(x_t, t, s, marginal, None)[1], u[:1], rtol=1e-6, atol=1e-6)


def test_shortcut_is_a_fixed_point_except_for_its_shortest_steps():
    _, _, x_t, _, _ = draws()
    loss = ShortcutLoss(ExactFlowMap(MIXTURE, steps=40), Uniform(), steps=16)
    for length in (4, 8, 16):
        t = torch.full((N,), 16 / 16, dtype=torch.float64)
        s = t - length / 16
        u, target = loss.pair(x_t, t, s, None, None)
        torch.testing.assert_close(target, u, rtol=1e-5, atol=1e-5)
    errors = []
    for steps in (32, 64, 128):  # two Euler steps against the exact one: order 1 in their length
        loss = ShortcutLoss(ExactFlowMap(MIXTURE, steps=40), Uniform(), steps=steps)
        t = torch.full((N,), 0.5, dtype=torch.float64)
        u, target = loss.pair(x_t, t, t - 2 / steps, None, None)
        errors.append((target - u).abs().mean().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.2)


class ExactTeacher(ExactFlowMap):
    """A teacher that follows the ODE exactly."""

    identity = "exact"


def consistency(teacher=None, stages=1, **options):
    return ConsistencyLoss(ExactFlowMap(MIXTURE, clean=True, **options), Uniform(), teacher, stages)


def test_consistency_distillation_is_a_fixed_point():
    x0, eps, _, t, _ = draws()
    for stages in (1, 3):
        loss = consistency(ExactTeacher(MIXTURE), stages)
        pairs = torch.stack([t, t * (1 - 2.0**-stages)], dim=1)
        assert loss(x0, pairs, eps).max() < 1e-5


def test_bias_of_consistency_training_is_of_second_order():
    """The mean over x0 and eps given x_t of the target f(x_r, r), against f(x_t, t); of order 2 in t - r."""
    _, _, x_t, _, _ = draws(1, seed=3)
    t = torch.tensor([0.6], dtype=torch.float64)
    posterior = Posterior(MIXTURE, 0.4 * torch.eye(2, dtype=torch.float64), x_t.flatten(), 0.6)
    flow = ExactFlowMap(MIXTURE, clean=True, steps=40)
    x0 = posterior.sample(4000, torch.Generator().manual_seed(0))
    # control variate: exact means of v and of its centred part
    v = (x_t - x0) / 0.6
    mean_v = (x_t - posterior.mean) / 0.6
    v = v - v.mean(dim=0) + mean_v
    f_t = x_t - t * flow.u(x_t, t, torch.zeros_like(t))
    biases = []
    for gap in (0.1, 0.05, 0.025):
        r = t - gap
        x_r = x_t - gap * v
        f_r = x_r - r * flow.u(x_r, r.expand(len(v)), torch.zeros(len(v), dtype=torch.float64))
        biases.append((f_r.mean(dim=0) - f_t[0]).norm().item())
    assert biases[0] / biases[1] == pytest.approx(4, rel=0.3)
    assert biases[1] / biases[2] == pytest.approx(4, rel=0.3)


def test_consistency_becomes_mean_flow_towards_clean_data():
    """The continuous-time limit (sCM): the target of u(x_t, t, 0) for r -> t is that of mean flow at s = 0."""
    _, _, x_t, t, _ = draws(low=0.3)
    v = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=x_t.dtype)  # of any data
    zero = torch.zeros_like(t)
    loss = mean_flow()
    limit = loss.pair(x_t, t, zero, v, None)[1]
    flow = ExactFlowMap(MIXTURE, steps=40)
    differences = []
    for gap in (1e-2, 1e-3):
        r = t - gap
        u_r = flow.u(x_t - gap * v, r, zero)
        target = (gap * v + r.view(-1, 1, 1, 1) * u_r) / t.view(-1, 1, 1, 1)
        u = flow.u(x_t, t, zero)
        # per unit of the gap: t (target - u) / gap -> v - u - t (v d/dx + d/dt) u
        differences.append((t.view(-1, 1, 1, 1) * (target - u) / gap - (limit - u)).abs().max().item())
    assert differences[1] < 1e-2 * (limit - u).abs().max()
    assert differences[0] / differences[1] == pytest.approx(10, rel=0.5)


def test_progressive_distillation_has_the_teachers_two_steps_as_target():
    x0, eps, x_t, _, _ = draws()
    schedule = RectifiedFlow()
    t, s = (
        NoiseLevel(*(torch.full((N,), v, dtype=torch.float64) for v in (1 - a, a, a))) for a in (0.75, 0.25)
    )
    x_s = torch.randn_like(x_t)
    target = implied_x0(x_t, x_s, t, s)
    noise = (x_t - 0.25 * target) / 0.75
    torch.testing.assert_close(0.75 * target + 0.25 * noise, x_s)

    class OfTwo(nn.Module):  # the velocity of two steps of the teacher, for each step of the grid
        second_time = True

        def forward(self, x, label, condition=None, to_label=None):
            times = label / 999, to_label / 999
            m = (times[0] + times[1]) / 2
            flow = teacher
            middle = solve(MIXTURE, x, times[0], m, flow.steps)
            return (solve(MIXTURE, middle, m, times[1], flow.steps) - x) / (times[1] - times[0]).view(
                -1, 1, 1, 1
            )

    teacher = ExactTeacher(MIXTURE, steps=40)
    student = Denoiser(OfTwo(), schedule, Velocity())
    loss = ProgressiveLoss(student, Simple(), Trailing(), teacher, steps=4)
    pairs = loss.draw(N, torch.Generator().manual_seed(0))
    assert set(pairs[:, 0].tolist()) <= {0.25, 0.5, 0.75, 1.0}
    assert torch.allclose(pairs[:, 0] - pairs[:, 2], torch.full((N,), 0.25, dtype=torch.float64))
    assert loss(x0, pairs, eps).max() < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_samples_of_the_exact_flow_map_have_the_distribution(steps, gamma):
    """On a mixture of three modes on a line, by the test of Kolmogorov and Smirnov with 4,000 samples."""
    means = torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64).view(3, 1, 1, 1)
    variances = torch.tensor([0.02, 0.05, 0.01], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mixture = Mixture(means, variances, weights)
    draw = torch.Generator().manual_seed(0)

    def noise(x):
        return torch.randn(x.shape, dtype=torch.float64, generator=draw)

    def sampled(network):
        x_T = noise(torch.empty(4000, 1, 1, 1))
        return FlowMapSampler(gamma)(network, x_T, Trailing()(RectifiedFlow(), steps), noise=noise).flatten()

    def cdf(x):
        z = (torch.as_tensor(x).view(-1, 1) - means.flatten()) / variances.sqrt()
        return (weights * torch.special.ndtr(z)).sum(dim=1).numpy()

    assert kstest(sampled(ExactFlowMap(mixture, steps=40)).numpy(), cdf).pvalue > 0.01
    wrong = Mixture(means, variances, torch.tensor([0.45, 0.3, 0.25], dtype=torch.float64))
    assert kstest(sampled(ExactFlowMap(wrong, steps=40)).numpy(), cdf).pvalue < 0.01


@pytest.fixture
def double(monkeypatch):
    """The embedding of the time in float64, of which differences can be taken."""

    def embedding(label, dim, frequency_shift):
        i = torch.arange(dim // 2, dtype=torch.float64)
        angle = label[:, None] * torch.exp(-math.log(10000) * i / (dim // 2 - frequency_shift))
        return torch.cat((angle.sin(), angle.cos()), dim=1)

    monkeypatch.setattr("src.model.embedding.sinusoidal_embedding", embedding)


def unet(**options):
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multipliers": (1, 1), "blocks_per_level": 1, "groups": 4}
    network = UNet(8, 1, **sizes, second_time=True, **options).double()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize(
    ("schedule", "parameterization"),
    [(RectifiedFlow(), Velocity()), (RectifiedFlow(), V()), (EDMSchedule(), EDM())],
)
def test_forward_derivative_equals_reverse_mode_and_differences(schedule, parameterization, double):
    """Of u of the U-Net along a line, time included."""
    flow = FlowMap(Denoiser(unet(), schedule, parameterization), "loss=mean_flow")
    draw = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64, generator=draw)
    t, s = torch.tensor([[0.9, 0.5, 0.3], [0.2, 0.1, 0.0]], dtype=torch.float64)
    u, du = flow.derivative(x, t, s, v)
    torch.testing.assert_close(u, flow(x, t, s))
    h = 1e-7
    difference = (flow(x + h * v, t + h, s) - flow(x - h * v, t - h, s)) / (2 * h)
    torch.testing.assert_close(du, difference, rtol=1e-5, atol=1e-5)
    # reverse mode twice: d/dw of (du^T w) along (v, 1)
    inputs = (x.requires_grad_(), t.requires_grad_())
    w = torch.zeros_like(u, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        slopes = torch.autograd.grad(flow(*inputs, s), inputs, w, create_graph=True)
    (reverse,) = torch.autograd.grad((slopes[0] * v).sum() + slopes[1].sum(), w)
    torch.testing.assert_close(du, reverse, rtol=1e-8, atol=1e-8)


def test_derivative_under_mixed_precision_on_the_cpu_is_that_of_float32():
    flow = FlowMap(Denoiser(unet().float(), RectifiedFlow(), Velocity()), "loss=mean_flow")
    draw = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 1, 8, 8, generator=draw)
    t, s = torch.tensor([[0.9, 0.5, 0.3], [0.2, 0.1, 0.0]], dtype=torch.float64)
    expected = flow.derivative(x, t, s, v)
    with torch.autocast("cpu", torch.bfloat16):
        found = flow.derivative(x, t, s, v)
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours, plain)


def test_derivative_reaches_the_attention_of_text(double):
    network = unet(token_channels=4)
    flow = FlowMap(Denoiser(network, RectifiedFlow(), Velocity()), "loss=mean_flow")
    draw = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64, generator=draw)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    condition = Condition(tokens=torch.randn(2, 3, 4, dtype=torch.float64, generator=draw), mask=mask)
    t, s = torch.tensor([[0.9, 0.5], [0.2, 0.1]], dtype=torch.float64)
    _, du = flow.derivative(x, t, s, v, condition)
    h = 1e-7
    difference = (flow(x + h * v, t + h, s, condition) - flow(x - h * v, t - h, s, condition)) / (2 * h)
    torch.testing.assert_close(du, difference, rtol=1e-5, atol=1e-5)


def test_the_target_has_no_gradient_and_the_weight_none(double):
    """The gradient is that of the squared error, divided by a number."""
    x0, eps = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    s = torch.tensor([0.1, 0.8, 0.2, 0.6], dtype=torch.float64)
    network = unet()
    loss = MeanFlowLoss(Denoiser(network, RectifiedFlow(), Velocity()), Uniform())
    parameters = list(network.parameters())
    losses = loss(x0, torch.stack([t, s], dim=1), eps)
    got = torch.autograd.grad(losses.sum(), parameters, materialize_grads=True)
    x_t = (1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * eps
    flow, v = loss.flow_map, eps - x0
    with torch.no_grad():
        h = 1e-7
        du = (flow(x_t + h * v, t + h, s) - flow(x_t - h * v, t - h, s)) / (2 * h)
        target = v - (t - s).view(-1, 1, 1, 1) * du
    error = (flow(x_t, t, s) - target).square().flatten(1)
    weight = 1 / (error.sum(dim=1).detach() + 1e-3)
    expected = torch.autograd.grad((weight * error.mean(dim=1)).sum(), parameters, materialize_grads=True)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        loss.eval()(x0, torch.stack([t, s], dim=1), eps), error.mean(dim=1), rtol=1e-4, atol=0
    )


def test_continuous_consistency_has_the_gradient_of_the_normalised_tangent(double):
    """Of the estimate of x0 along the path, by differences (Lu & Song 2024, without the weight by time)."""
    x0, eps = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    network = unet()
    denoiser = Denoiser(network, RectifiedFlow(), Velocity())
    loss = ContinuousConsistencyLoss(denoiser, Uniform(), share=1.0, power=0.5)
    draws = loss.draw(4, torch.Generator().manual_seed(0))
    t, s = draws.T
    assert (s == 0).all()
    assert t.unique().numel() == 4
    parameters = list(network.parameters())
    got = torch.autograd.grad(loss(x0, draws, eps).sum(), parameters, materialize_grads=True)
    clean = denoiser.schedule(s)

    def estimate(h):  # of x0 at the time t + h, on the line through x0 and eps
        time = t + h
        x_t = (1 - time).view(-1, 1, 1, 1) * x0 + time.view(-1, 1, 1, 1) * eps
        return denoiser(x_t, denoiser.schedule(time), None, clean).x0

    with torch.no_grad():
        h = 1e-6
        tangent = (estimate(h) - estimate(-h)) / (2 * h)
        norm = (tangent.square().flatten(1).sum(dim=1) + 1e-3).sqrt()
    value = 2 / (t * norm * x0[0].numel()) * (estimate(0) * tangent).flatten(1).sum(dim=1)
    expected = torch.autograd.grad(value.sum(), parameters, materialize_grads=True)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_draws():
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(unet(), RectifiedFlow(), Velocity())
    mean, shortcut = MeanFlowLoss(denoiser, Uniform()), ShortcutLoss(denoiser, Uniform())
    for loss in (mean, shortcut):
        t, s = loss.draw(4000, generator).T
        assert ((s <= t) & (s >= 0) & (t <= 1)).all()
        assert ((t > s).double().mean() - 0.25).abs() < 0.01
        assert loss.draw_for_validation(1, generator).shape == (1, 2)
    t, s = shortcut.draw(4000, generator).T
    lengths = ((t - s)[t > s] * 128).round().long()
    assert set(lengths.tolist()) == {2, 4, 8, 16, 32, 64, 128}
    assert ((t[t > s] * 128).round().long() % lengths == 0).all()
    assert torch.equal(
        shortcut.draw(8, torch.Generator().manual_seed(1)), shortcut.draw(8, torch.Generator().manual_seed(1))
    )
    # spread evenly: every device of four gets its share
    counts = moving(64, 0.25, generator).view(4, 16).sum(dim=1)
    assert ((counts - 4).abs() <= 1).all()


def test_consistency_has_stages_by_the_step():
    loss = ConsistencyLoss(Denoiser(unet(), RectifiedFlow(), Velocity()), Uniform(), stages=3, every=10)

    def ratio(number):
        t, r = loss.draw_at(number, 4, torch.Generator().manual_seed(0)).T
        return (1 - r / t).mean().item()

    found = [ratio(number) for number in (0, 9, 10, 20, 29, 1000)]
    assert found == pytest.approx([1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 8, 1 / 8])
    t, r = loss.draw_for_validation(4, torch.Generator().manual_seed(0)).T
    assert (1 - r / t).mean().item() == pytest.approx(1 / 8)


class Fused(nn.Module):
    """A network of another package with fused attention."""

    second_time = True
    image_shape = (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x, label, condition=None, to_label=None):
        return nn.functional.scaled_dot_product_attention(self.weight * x, x, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MeanFlowLoss(flow(UNet(8, 1, base_channels=8, groups=4)), Uniform()),
            "model.second_time=false",
        ),
        (
            lambda: MeanFlowLoss(Denoiser(unet(), Cosine(), V()), Uniform()),
            "schedule: loss=mean_flow needs continuous",
        ),
        (
            lambda: MeanFlowLoss(flow(unet()), Importance()),
            "time_sampling=importance is for losses of one time",
        ),
        (lambda: MeanFlowLoss(flow(unet()), Uniform(), share=0.0), "share must be in"),
        (lambda: ShortcutLoss(flow(unet()), Uniform(), steps=100), "steps must be a power of 2"),
        (lambda: ConsistencyLoss(flow(unet()), Uniform(), stages=0), "stages must be at least 1"),
        (lambda: ProgressiveLoss(flow(unet()), Simple(), Trailing()), "loss.run is missing"),
        (lambda: progressive(Cosine(), Leading()), "spacing: the times of 4 steps of Leading are not"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def flow(network):
    return Denoiser(network, RectifiedFlow(), Velocity())


def progressive(schedule, spacing):
    denoiser = Denoiser(unet(), schedule, V())
    return ProgressiveLoss(denoiser, Simple(), spacing, denoiser, steps=4)


def test_attention_without_a_forward_derivative_is_named_before_training():
    network = Fused()
    with pytest.raises(
        ValueError, match=r"^model: an operator of Fused has no forward.*attend in it"
    ) as error:
        MeanFlowLoss(flow(network), Uniform())
    assert "\n" not in str(error.value)


def test_a_teacher_is_neither_trained_nor_saved_and_must_be_the_same():
    student, teacher = flow(unet()), flow(unet())
    teacher.identity = "run(a)"
    loss = ConsistencyLoss(student, Uniform(), teacher)
    assert len(list(loss.parameters())) == len(list(student.parameters()))
    state = loss.state_dict()
    assert all(name.startswith("denoiser.") or name == "_extra_state" for name in state)
    loss.load_state_dict(state)
    teacher.identity = "run(b)"
    with pytest.raises(UserError, match=r"^loss.run: this training began with the teacher run\(a\)"):
        loss.load_state_dict(state)
