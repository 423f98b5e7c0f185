"""The sampling loop: number of evaluations, errors, and unchanged inputs."""

import math

import pytest
import torch

from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import Eps, V
from src.diffusion.sampler import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    LMS,
    PLMS,
    Euler,
    EulerMaruyama,
    Heun,
    MultistepDPMSolver,
    PredictorCorrector,
    ReplayedNoise,
    Restart,
    SinglestepDPMSolver,
    UniPC,
)
from src.diffusion.schedule import EDM, VP, Linear, RectifiedFlow, ZeroTerminalSNR
from src.diffusion.spacing import Karras, Trailing, UniformTime
from src.errors import UserError
from tests.diffusion.mixture import MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import Wavy, recorded_noise, standard_normal

# number of evaluations for S steps that end at clean data
EVALUATIONS = {
    DDIM(): lambda S: S,
    DDPM(): lambda S: S,
    Euler(): lambda S: S,
    Heun(): lambda S: 2 * S - 1,
    DPM2(): lambda S: 2 * S - 1,
    SinglestepDPMSolver(2): lambda S: 2 * S - 1,
    SinglestepDPMSolver(3): lambda S: 3 * S - 2,
    SinglestepDPMSolver(2, eta=1.0): lambda S: 2 * S - 1,
    MultistepDPMSolver(3): lambda S: S,
    MultistepDPMSolver(2, eta=1.0): lambda S: S,
    UniPC(3): lambda S: S,
    DEIS(3): lambda S: S,
    LMS(4): lambda S: S,
    PLMS(): lambda S: S + 1,
    PLMS(runge_kutta=True): lambda S: S + 9,
    EulerMaruyama(): lambda S: S,
    PredictorCorrector(DDPM(), corrections=2): lambda S: 3 * S,
    # two repetitions of two Heun steps
    Restart(Heun()): lambda S: 2 * S - 1 + 2 * 2 * 2,
}


def _name(sampler):
    return type(sampler).__name__


@pytest.mark.parametrize(("sampler", "count"), EVALUATIONS.items(), ids=_name)
def test_evaluations_are_counted(sampler, count):
    schedule = EDM()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    x_T = 80 * recorded_noise(0)(torch.empty(2, 1, 1, 2))
    states = list(sampler.trajectory(denoiser, x_T, Karras()(schedule, 18), noise=recorded_noise()))
    assert len(states) == 19
    assert states[0].evaluations == 0
    assert states[-1].evaluations == denoiser.calls == count(18)


@pytest.mark.parametrize("sampler", EVALUATIONS, ids=_name)
@pytest.mark.parametrize("schedule", [RectifiedFlow(), ZeroTerminalSNR(Linear()), VP()], ids=_name)
def test_every_sampler_works_on_every_schedule_from_pure_noise(sampler, schedule):
    # with few steps the images are close to the modes of the data but not exact
    denoiser = MixtureDenoiser(three_modes(), schedule)
    x_T = recorded_noise(0)(torch.empty(200, 1, 1, 2))
    images = sampler(denoiser, x_T, Trailing()(schedule, 50), noise=recorded_noise())
    assert images.dtype == torch.float64
    distance = (images - three_modes().means.unsqueeze(1)).flatten(2).norm(dim=2).min(dim=0).values
    assert distance.median() < 0.35  # the median distance of data is 0.19, of noise 0.9
    assert (images.mean(dim=0) - three_modes().mean).abs().max() < 0.2


@pytest.mark.parametrize("sampler", EVALUATIONS, ids=_name)
def test_output_has_the_dtype_of_the_input_and_float32_agrees_with_float64(sampler):
    denoiser = Denoiser(Wavy(), VP(), V())
    times = UniformTime()(VP(), 20)
    noise = [standard_normal((3, 1, 4, 4), i) for i in range(100)]
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        x_T = standard_normal((3, 1, 4, 4)).to(dtype)
        outputs[dtype] = sampler(denoiser, x_T, times, noise=ReplayedNoise(noise))
        assert outputs[dtype].dtype == dtype
    torch.testing.assert_close(outputs[torch.float32].double(), outputs[torch.float64], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", EVALUATIONS, ids=_name)
def test_inputs_are_not_modified(sampler):
    denoiser = Denoiser(Wavy(), VP(), V())
    times, x_T = UniformTime()(VP(), 8), standard_normal((3, 1, 4, 4))
    kept, kept_times = x_T.clone(), times.clone()
    states = list(sampler.trajectory(denoiser, x_T, times, noise=recorded_noise()))
    copies = [state.x.clone() for state in states]
    assert torch.equal(x_T, kept)
    assert torch.equal(times, kept_times)
    again = list(sampler.trajectory(denoiser, x_T, times, noise=recorded_noise()))
    for state, copy, repeated in zip(states, copies, again, strict=True):
        assert torch.equal(state.x, copy)  # later steps do not modify earlier states
        assert torch.equal(state.x, repeated.x)  # the sampler keeps no state


def test_repr_is_the_constructor_call():
    # protocols store the repr, so it has no addresses and no derived values
    assert repr(DDIM(0.5)) == "DDIM(eta=0.5)"
    assert repr(LMS(3)) == "LMS(order=3)"
    assert (
        repr(PredictorCorrector(DDPM()))
        == "PredictorCorrector(predictor=DDPM(), corrections=1, snr=0.16, batch_norms=False)"
    )


class Failing(torch.nn.Module):
    """Returns `value` (NaN or infinity) in one pixel at the given call."""

    def __init__(self, call, value):
        super().__init__()
        self.call, self.value, self.calls = call, value, 0

    def forward(self, x, label, condition=None):
        self.calls += 1
        output = 0.1 * x
        if self.calls == self.call:
            output[1, 0, 2, 3] = self.value
        return output


@pytest.mark.parametrize("sampler", EVALUATIONS, ids=_name)
@pytest.mark.parametrize(("call", "value"), [(1, math.nan), (9, math.nan), (3, math.inf)])
def test_images_that_are_not_finite_are_an_error(sampler, call, value):
    denoiser = Denoiser(Failing(call, value), Linear(), Eps())
    with pytest.raises(UserError, match=r"^sampling: the images are not finite .* diverged"):
        sampler(denoiser, standard_normal((2, 1, 4, 4)), Trailing()(Linear(), 20))


@pytest.mark.parametrize("times", [[1.0], [1.0, 2.0], [5.0, 5.0, 0.0], [[3.0, 0.0]]])
def test_times_must_decrease(times):
    with pytest.raises(ValueError, match=r"^times must be at least two decreasing values"):
        DDIM()(Denoiser(Wavy(), Linear(), Eps()), standard_normal((1, 1, 2, 2)), times)


def test_condition_reaches_the_network():
    class Labelled(torch.nn.Module):
        def forward(self, x, label, condition=None):
            return 0.1 * x + condition.view(-1, 1, 1, 1)

    denoiser = Denoiser(Labelled(), Linear(), Eps())
    x_T, labels = standard_normal((2, 1, 2, 2)), torch.tensor([0.0, 1.0])
    both = Heun()(denoiser, x_T, Trailing()(Linear(), 5), condition=labels)
    alone = Heun()(denoiser, x_T[1:], Trailing()(Linear(), 5), condition=labels[1:])
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(1.5), r"eta must be in \[0, 1\], got 1.5"),
        (lambda: SinglestepDPMSolver(eta=2.0), r"eta must be in \[0, 1\], got 2.0"),
        (lambda: SinglestepDPMSolver(4), r"order must be a whole number in \[2, 3\], got 4"),
        (lambda: SinglestepDPMSolver(nodes="t"), "nodes must be log_snr, time or sqrt_time, got t"),
        (lambda: SinglestepDPMSolver(1), r"order must be a whole number in \[2, 3\], got 1"),
        (
            lambda: MultistepDPMSolver(2, lower_order_final=-1),
            r"lower_order_final must be true, false or .*, got -1",
        ),
        (lambda: MultistepDPMSolver(2.5), r"order must be a whole number in \[1, 3\], got 2.5"),
        (lambda: MultistepDPMSolver(4), r"order must be a whole number in \[1, 3\], got 4"),
        (lambda: MultistepDPMSolver(eta=-1.0), "eta must be at least 0, got -1"),
        (lambda: MultistepDPMSolver(eta=1.0, plus_plus=False), "eta must be 0 with plus_plus=false"),
        (lambda: UniPC(4), r"order must be a whole number in \[1, 3\], got 4"),
        (lambda: UniPC(bh=3), "bh must be 1 or 2, got 3"),
        (lambda: DEIS(5), r"order must be a whole number in \[1, 4\], got 5"),
        (lambda: LMS(0), r"order must be a whole number in \[1, 4\], got 0"),
        (lambda: Euler(s_churn=-1.0), "s_churn must be at least 0"),
        (lambda: Heun(s_min=2.0, s_max=1.0), "s_min must be in"),
        (lambda: DPM2(s_noise=-1.0), "s_noise must be at least 0"),
        (lambda: PredictorCorrector(LMS()), "predictor must be a single-step method, and LMS is multi-step"),
        (lambda: PredictorCorrector(DDPM(), corrections=0), "corrections must be at least 1"),
        (lambda: PredictorCorrector(DDPM(), snr=0.0), "snr must be positive"),
        (lambda: Restart(UniPC()), "solver must be a single-step method, and UniPC is multi-step"),
        (lambda: Restart(Heun(), sigma_min=1.0), "sigma_min must be in"),
        (lambda: Restart(Heun(), repeats=0), "repeats must be at least 1"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(("steps", "same_as"), [(14, True), (15, False)])
def test_order_is_lowered_at_the_end_of_short_trajectories(steps, same_as):
    denoiser = Denoiser(Wavy(), Linear(), Eps())
    x_T, times = standard_normal((1, 1, 2, 2)), Trailing()(Linear(), steps)

    def end(lower_order_final):
        return MultistepDPMSolver(3, lower_order_final=lower_order_final)(denoiser, x_T, times)

    assert torch.equal(end(15), end(same_as))
    assert not torch.equal(end(15), end(not same_as))


def test_trajectory_continues_outside_inference_mode():
    denoiser = Denoiser(Wavy(), Linear(), Eps())
    states = DDIM().trajectory(denoiser, standard_normal((1, 1, 2, 2)), Trailing()(Linear(), 3))
    with torch.inference_mode():
        next(states), next(states)
    assert len(list(states)) == 2
