"""Checks index lists against the published formulas in numpy, and the errors."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from src.diffusion.schedule import EDM, VP, ContinuousCosine, Linear, RectifiedFlow
from src.diffusion.spacing import (
    Karras,
    Leading,
    Linspace,
    Quadratic,
    QuadraticTime,
    Sections,
    Trailing,
    UniformLogSNR,
    UniformTime,
)


def _indices(spacing, T, steps):
    """The 0-based indices as in the published code, increasing."""
    times = spacing(Linear(T), steps)
    assert times.dtype == torch.float64
    assert times[-1] == 0
    return (times[:-1] - 1).long().flip(0).tolist()


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50, 100, 1000])
def test_leading_is_the_linear_subsequence_of_ddim(steps):
    assert _indices(Leading(), 1000, steps) == list(range(0, 1000, 1000 // steps))


def test_leading_has_the_given_number_of_steps_if_it_does_not_divide_T():
    # range(0, 1000, 1000 // 30) of the DDIM code has 31 entries
    assert _indices(Leading(), 1000, 30) == list(range(0, 990, 33))


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 64, 100, 999, 1000])
def test_trailing(steps):
    expected = np.round(np.arange(1000, 0, -1000 / steps)).astype(int)[:steps] - 1
    assert _indices(Trailing(), 1000, steps) == expected[::-1].tolist()


def test_trailing_is_exact_for_every_number_of_steps():
    # where T (S - i)/S ends in .5, floating point can round it either way: 240, 304, 464, ... steps
    for steps in range(1, 1001):
        exact = [round(Fraction(1000 * (steps - i), steps)) for i in range(steps)]
        assert Trailing()(Linear(), steps).tolist() == [*exact, 0], steps


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 64, 100, 999, 1000])
def test_linspace(steps):
    assert _indices(Linspace(), 1000, steps) == np.linspace(0, 999, steps).round().astype(int).tolist()


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50, 100])
@pytest.mark.parametrize("T", [1000, 4000])
def test_quadratic_is_the_ddim_code_without_duplicates(T, steps):
    expected = [int(s) for s in list(np.linspace(0, np.sqrt(T * 0.8), steps) ** 2)]
    assert _indices(Quadratic(), T, steps) == sorted(set(expected))


def test_quadratic_drops_duplicates():
    assert len(Quadratic()(Linear(1000), 50)) == 49 + 1
    assert len(Quadratic()(Linear(1000), 100)) == 96 + 1


def test_many_duplicates_are_refused():
    with pytest.raises(
        ValueError, match=r"^steps=1000 with quadratic spacing visits only 688 distinct times"
    ):
        Quadratic()(Linear(1000), 1000)


def _improved_ddpm_sections(T, counts):
    """The respacing procedure of improved DDPM: running sums of the fractional stride."""
    start, steps = 0, []
    for i, count in enumerate(counts):
        size = T // len(counts) + (1 if i < T % len(counts) else 0)
        stride = 1.0 if count <= 1 else (size - 1) / (count - 1)
        place = 0.0
        for _ in range(count):
            steps.append(start + round(place))
            place += stride
        start += size
    return sorted(set(steps))


@pytest.mark.parametrize("sections", ["10,15,20", "1", "25", "90,60,60,20,20", "1000", "7,1", "333,333,333"])
def test_sections(sections):
    counts = [int(c) for c in sections.split(",")]
    expected = _improved_ddpm_sections(1000, counts)
    assert len(expected) == sum(counts)
    assert _indices(Sections(sections), 1000, sum(counts)) == expected


@pytest.mark.parametrize(("steps", "stride"), [(25, 40), (50, 20), (100, 10), (34, 30), (1000, 1)])
def test_ddim_sections_are_strided(steps, stride):
    assert _indices(Sections(f"ddim{steps}"), 1000, steps) == list(range(0, 1000, stride))


@pytest.mark.parametrize("steps", [1, 10, 25, 300])
def test_sections_without_numbers_use_the_number_of_steps(steps):
    assert torch.equal(Sections()(Linear(), steps), Sections(steps)(Linear(), steps))
    if steps != 300:
        assert torch.equal(Sections("ddim")(Linear(), steps), Sections(f"ddim{steps}")(Linear(), steps))


@pytest.mark.parametrize("schedule", [VP(), EDM(), Linear(1000)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [2, 10, 37])
def test_quadratic_time_is_uniform_in_the_square_root_of_time(schedule, steps):
    expected = np.linspace(np.sqrt(schedule.t_max), np.sqrt(schedule.t_min), steps) ** 2
    times = QuadraticTime()(schedule, steps)
    np.testing.assert_allclose(times, [*expected, 0], rtol=1e-12)
    assert [times[0], times[-2]] == [schedule.t_max, schedule.t_min]
    # "time_quadratic" of DPM-Solver's code, from 1 to 1e-3
    theirs = np.linspace(1, np.sqrt(1e-3), steps) ** 2
    np.testing.assert_allclose(QuadraticTime(1e-3)(VP(), steps)[:-1], theirs, rtol=1e-12)


def test_error_for_an_invalid_stride_names_valid_steps():
    # 63 = len(range(0, 1000, 16)), 67 = len(range(0, 1000, 15))
    with pytest.raises(ValueError, match=r"^steps=64: no whole stride .* choose 63 or 67"):
        Sections("ddim64")(Linear(1000), 64)


def test_sections_must_add_up():
    with pytest.raises(ValueError, match=r"^steps must be 45, the sum of spacing.sections; got 50"):
        Sections("10,15,20")(Linear(1000), 50)
    with pytest.raises(ValueError, match=r"^steps of section 2 must be at most its 500 times, got 501"):
        Sections("1,501")(Linear(1000), 502)
    for wrong in ("", "ten", "10,,5", "ddim10,5", "0"):
        with pytest.raises(ValueError, match=r'^sections must read like "10,15,20" or "ddim25"'):
            Sections(wrong)


@pytest.mark.parametrize("steps", [2, 10, 18])
def test_karras_is_eq_5(steps):
    schedule = Linear()
    level = schedule(Karras(7.0, 0.02, 80.0)(schedule, steps)[:-1])
    i = np.arange(steps)
    expected = (80 ** (1 / 7) + i / (steps - 1) * (0.02 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose((level.sigma / level.alpha).numpy(), expected, rtol=1e-10)


def test_karras_covers_the_schedule_by_default():
    times = Karras()(Linear(), 10)
    assert times[0].item() == pytest.approx(1000, abs=1e-9)
    assert times[-2].item() == pytest.approx(1, abs=1e-9)


def test_uniform_log_snr():
    schedule = Linear()
    log_snr = schedule(UniformLogSNR()(schedule, 11)[:-1]).log_snr
    torch.testing.assert_close(log_snr.diff(), (log_snr[-1] - log_snr[0]).expand(10) / 10)
    assert schedule(torch.tensor([1000.0, 1.0])).log_snr.tolist() == pytest.approx(log_snr[[0, -1]].tolist())


def test_uniform_time_interpolates_between_rows():
    assert UniformTime()(Linear(1000), 5).tolist() == [1000.0, 750.25, 500.5, 250.75, 1.0, 0.0]


def test_uniform_grids_can_end_where_the_published_code_does():
    # the code of score SDE and DPM-Solver goes from 1 to 1e-3, which in DPM-Solver is 4.56 in ln(alpha/sigma)
    beta_integral = 0.1 * 1e-3 + (20 - 0.1) / 2 * 1e-6
    alpha2 = math.exp(-beta_integral)
    schedule = VP()
    assert UniformTime(1e-3)(schedule, 4).tolist() == pytest.approx([1, 0.667, 0.334, 0.001, 0])
    times = UniformLogSNR(1e-3)(schedule, 4)
    assert times[-2].item() == pytest.approx(1e-3, rel=1e-9)
    log_snr = schedule(times[:-1]).log_snr
    assert log_snr[-1].item() == pytest.approx(math.log(alpha2 / (1 - alpha2)) / 2, rel=1e-9)
    torch.testing.assert_close(log_snr.diff(), (log_snr[-1] - log_snr[0]).expand(3) / 3)
    # a table ends at its first row
    assert UniformTime(1e-3)(Linear(100), 2).tolist() == [100, 1, 0]


@pytest.mark.parametrize("end", [-0.1, 1.0])
@pytest.mark.parametrize("spacing", [UniformTime, QuadraticTime, UniformLogSNR])
def test_end_out_of_range_is_refused(spacing, end):
    with pytest.raises(ValueError, match=rf"^end must be in \[0, 1\), got {end}"):
        spacing(end)


EVERY = [
    Leading(),
    Linspace(),
    Quadratic(),
    Sections(),
    Trailing(),
    UniformTime(),
    QuadraticTime(),
    UniformLogSNR(),
    Karras(),
]


@pytest.mark.parametrize("spacing", EVERY, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_times_decrease_to_clean_data(spacing, steps):
    times = spacing(Linear(1000), steps)
    assert len(times) == steps + 1
    assert (times.diff() < 0).all()
    assert times[-1] == 0


@pytest.mark.parametrize(
    "spacing", [UniformTime(), UniformLogSNR(), Karras()], ids=lambda s: type(s).__name__
)
def test_zero_steps_are_refused(spacing):
    with pytest.raises(ValueError, match=r"^steps must be at least 1, got 0"):
        spacing(Linear(1000), 0)


@pytest.mark.parametrize("spacing", [Leading(), Linspace(), Quadratic(), Trailing()])
@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_more_steps_than_rows_are_refused(spacing, steps):
    with pytest.raises(ValueError, match=r"^steps must be in \[1, 1000\], the schedule's T; got"):
        spacing(Linear(1000), steps)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"rho": 0.0}, "rho must be positive"),
        ({"sigma_min": -1.0}, "sigma_min must be positive"),
        ({"sigma_min": 1.0, "sigma_max": 0.5}, "sigma_max must be above sigma_min"),
    ],
)
def test_invalid_arguments_of_karras_are_refused(numbers, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Karras(**numbers)


def test_karras_range_must_lie_in_the_schedule():
    with pytest.raises(ValueError, match=r"^steps need spacing.sigma_min in \[0.01, 157"):
        Karras(sigma_min=0.002)(Linear(1000), 10)


@pytest.mark.parametrize("schedule", [VP(), EDM(), ContinuousCosine()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "spacing", [UniformTime(), UniformLogSNR(), Karras()], ids=lambda s: type(s).__name__
)
def test_spacings_cover_continuous_schedules_from_end_to_end(spacing, schedule):
    times = spacing(schedule, 10)
    assert len(times) == 11
    assert (times.diff() < 0).all()
    assert times[0].item() == pytest.approx(schedule.t_max, rel=1e-6)
    assert times[-2].item() == pytest.approx(schedule.t_min, rel=1e-3)
    assert times[-1] == 0


def test_trailing_is_the_grid_of_flow_models():
    assert Trailing()(RectifiedFlow(), 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(
        ValueError, match=r"^steps=2000 of trailing spacing end at 0.0005, below .* t_min 0.001"
    ):
        Trailing()(RectifiedFlow(), 2000)


@pytest.mark.parametrize(
    "spacing", [Leading(), Linspace(), Quadratic(), Sections("10")], ids=lambda s: type(s).__name__
)
def test_spacings_of_tables_refuse_continuous_schedules(spacing):
    with pytest.raises(
        ValueError, match=r"^steps of a continuous schedule cannot be spaced by .*: choose spacing="
    ):
        spacing(VP(), 10)


@pytest.mark.parametrize("spacing", [UniformLogSNR(), Karras()], ids=lambda s: type(s).__name__)
def test_pure_noise_has_no_log_snr(spacing):
    with pytest.raises(ValueError, match=r"^steps cannot be spaced in log-SNR from pure noise"):
        spacing(RectifiedFlow(), 10)
    # a given sigma_max has a finite log-SNR
    assert len(Karras(sigma_max=100.0)(RectifiedFlow(), 10)) == 11
