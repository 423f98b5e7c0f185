"""Variants of an evaluation: their options, their differences, and the budget of a search."""

import math

import pytest
import torch

from src.app.bench import Bench, Scored, in_hydra, overrides_of
from src.app.explain import (
    Axis,
    _guidance_axes,
    _labels,
    _row,
    check_score,
    other_conditions,
    protocol_from,
)
from src.app.search import Candidate, affordable, rungs, without_repeats
from src.app.sweep.jobs import combinations
from src.diffusion.sampler import DDIM, DDPM, Heun
from src.diffusion.spacing import Trailing
from src.errors import UserError
from src.evaluation.record import Record
from src.generation.recipe import describe
from src.metrics.uncertainty import by_influences


@pytest.mark.parametrize(
    ("group", "description", "options"),
    [
        ("sampler", describe(DDIM(eta=0.5)), ["sampler=ddim", "sampler.eta=0.5"]),
        ("sampler", describe(DDIM(eta=0.0)), ["sampler=ddim"]),
        ("sampler", describe(DDPM()), ["sampler=ddpm"]),
        ("sampler", describe(Heun()), ["sampler=heun"]),
        ("spacing", describe(Trailing()), ["spacing=trailing"]),
        ("clipping", "none", ["clipping=none"]),
        ("clipping", "StaticClipping(bound=1.0)", ["clipping=static"]),
        (
            "guidance",
            "ClassifierFree(scale=3.0, interval=[0.2, 5.0], rescale=0.0, batched=True)",
            ["guidance=interval", "guidance.scale=3.0"],
        ),
        ("sampler", "their own sampler", None),
        ("sampler", "Unknown(a=1)", None),
        ("sampler", "DDIM(eta=__import__('os'))", None),
        ("sampler", "DDIM(eta='${oc.env:TOKEN}')", None),
        ("sampler", "DDIM(eta=[0, '${oc.env:TOKEN}'])", None),
        ("sampler", "DDIM(eta={'a': 1})", None),
        ("sampler", "DDIM(eta='1,2')", None),
        ("sampler", "DDIM(**{'eta': '${oc.env:TOKEN}'})", None),
        ("sampler", "DDIM(folder='other')", None),
        ("guidance", "AutoGuidance(run='/other', scale=2.0)", None),
        ("guidance", "AutoGuidance(scale=2.0)", None),
        ("guidance", "ClassifierFree(interval=['${oc.env:TOKEN}', 5.0])", None),
    ],
)
def test_a_part_of_a_record_becomes_options(group, description, options):
    assert overrides_of(group, description) == options


def test_values_for_hydra():
    assert in_hydra([None, True, 1.5, "a"]) == "[null,true,1.5,a]"
    for value in ("${oc.env:TOKEN}", "a b", "choice(1)", "", {}, b"a", ["a,b"]):
        with pytest.raises(ValueError, match="no word"):
            in_hydra(value)


def test_strength_and_interval_of_guidance_are_separate_axes():
    def text(scale, interval):
        return f"ClassifierFree(scale={scale}, interval={interval}, rescale=0.0, batched=True)"

    strength, interval = _guidance_axes(text(2.0, None), text(3.0, [0.2, 5.0]))
    assert (strength.name, interval.name) == ("guidance", "interval")
    assert set(strength.options) >= {"guidance.scale=3.0", "guidance.interval=null"}
    assert set(interval.options) >= {"guidance=classifier_free", "guidance.interval=[0.2,5.0]"}
    (unsafe,) = _guidance_axes(text(2.0, None), text(3.0, ["${oc.env:TOKEN}", 5.0]))
    assert unsafe.options is None
    (only,) = _guidance_axes("none", text(2.0, None))
    assert only.options == ("guidance=classifier_free",)


def test_labels_of_a_record():
    assert _labels("image i has a label drawn from 0 to 9 by (seed, i)") == ("labels=random",)
    assert _labels("image i has label i mod 10") == ("labels=balanced",)
    assert _labels("image i has entry i mod 3 of [3, 5, 5]") == ("labels=[3,5,5]",)
    assert _labels("none") is None
    assert _labels("image i has entry i mod 1 of [${oc.env:TOKEN}]") is None
    assert _labels("image i has text i mod 2 of ['a', 'b'], encoded by CLIP") is None


class OwnDigits:
    """The data of the run."""

    name = "digits"

    def fingerprint(self, split: str) -> str:
        return f"of digits {split}"


def test_conditions_of_a_record_that_no_option_makes_are_listed():
    reference = {"data": "digits", "split": "train", "count": 1504, "fingerprint": "abc"}
    mine = {
        "reference": reference,
        "features": {"name": "digits", "sha256": "cafe", "num_features": 64},
        "settings": {"subsets": 100, "sizes": (1, 2)},
        "recipe": {"training_steps": 20, "steps": 5},
    }

    def found(**theirs):
        rows = other_conditions(mine, theirs, "kd", OwnDigits())
        assert all(row.options is None for row in rows)
        return {row.name: (row.before, row.after) for row in rows}

    assert found() == {}
    assert found(**{**mine, "settings": {"subsets": 100, "sizes": [1, 2]}}) == {}
    assert found(
        reference={"kd": {"data": "cifar10", "split": "train", "count": 777}, "accuracy": None},
        features={"kd": {"sha256": "beef"}},
        settings={"kd": {"subsets": 10}},
        recipe={
            "training_steps": 999,
            "steps": 18,
            "network_evaluations": 36,
            "noise": "drawn on cuda",
            "[/red]": 1,
        },
    ) == {
        "reference.data": ("digits", "cifar10"),
        "reference.count": ("1504", "777"),
        "features.sha256": ("cafe", "beef"),
        "settings.subsets": ("100", "10"),
        "recipe.training_steps": ("20", "999"),
        "recipe.noise": ("drawn on cpu", "drawn on cuda"),
        "recipe.[/red]": ("None", "1"),
    }
    # equal images have equal fingerprints, whatever their file is called
    assert found(reference={**reference, "data": "train.npz", "split": "all"}) == {}
    assert found(reference={"data": "some.npz", "split": "all", "count": 200, "fingerprint": "def"}) == {
        "reference.data": ("digits", "some.npz"),
        "reference.split": ("train", "all"),
    }


@pytest.mark.parametrize(
    ("mine", "theirs", "axis"),
    [
        (("digits", "train"), ("digits", "test"), ("train", "test")),
        (("digits", "test"), ("digits", "train"), ("test", "train")),
        (("digits", "test"), ("digits", "test"), None),
        (("some.npz", "all"), ("digits", "train"), ("some.npz", "train")),
        # the split of other data than the run's
        (("cifar10", "train"), ("cifar10", "test"), ("train", "test", None)),
    ],
)
def test_another_split_of_the_runs_data_is_an_axis(mine, theirs, axis):
    def protocol(data, split):
        reference = {"data": data, "split": split, "count": 9, "fingerprint": f"of {data} {split}"}
        return {"reference": reference, "recipe": {}}

    found = other_conditions(protocol(*mine), protocol(*theirs), "kd", OwnDigits())
    if axis is None:
        assert found == []
    elif len(axis) == 2:
        assert found == [Axis("reference", *axis, (f"reference={axis[1]}",))]
    else:
        assert found == [Axis("reference.split", *axis)]


def test_a_split_of_the_same_name_with_other_images_is_no_axis():
    mine = {"reference": {"data": "digits", "split": "train", "count": 9, "fingerprint": "a"}, "recipe": {}}
    theirs = {"reference": {"data": "digits", "split": "test", "fingerprint": "of digits elsewhere"}}
    assert other_conditions(mine, theirs, "kd", OwnDigits()) == [
        Axis("reference.fingerprint", "of digits test", "of digits elsewhere", None)
    ]


def test_entries_that_a_record_of_this_program_leaves_out_are_as_usual():
    def recipe(**protocol):
        return protocol_from(Record({}, protocol), "theirs.json").get("recipe")

    usual = {"precision": "32-true", "compiled": False, "noise": "drawn on cpu"}
    assert recipe(recipe={"steps": 5}, versions={}) == {"steps": 5, **usual}
    assert recipe(recipe={"precision": "bf16-mixed"}, versions={})["precision"] == "bf16-mixed"
    # written by hand, and of given images
    assert recipe(recipe={"steps": 5}) == {"steps": 5}
    assert recipe(versions={}) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_to_explain_is_finite(value):
    record = Record({"fid": value, "kid": 0.1}, {})
    check_score(record, "theirs.json", "kid")
    with pytest.raises(UserError, match=rf"^record=theirs.json: fid is {value}; give a record with a finite"):
        check_score(record, "theirs.json", "fid")
    with pytest.raises(UserError, match=r"^record=theirs.json: it has fid, kid and not fd_digits; choose"):
        check_score(record, "theirs.json", "fd_digits")


def test_an_interval_that_is_not_finite_is_refused():
    record = Record({"fid": 3.0}, {}, intervals={"fid": [2.0, float("inf")]})
    with pytest.raises(
        UserError, match=r"^record=theirs.json: the interval of fid is not finite; correct it"
    ):
        check_score(record, "theirs.json", "fid")


def test_the_share_of_a_gap_includes_the_interval_of_the_gap():
    effects = torch.linspace(-1, 1, 100, dtype=torch.float64)
    base, variant = scored(effects, 1.0), scored(effects, 1.5)
    axis = Axis("steps", "5", "10", ("sampler.steps=10",))
    assert _row(axis, variant, base, gap=2.0)["share_half_interval"] == pytest.approx(0, abs=1e-6)
    assert _row(axis, variant, base, 2.0, 1.0)["share_half_interval"] == pytest.approx(0.25 * 1.0 / 2.0)


def test_options_of_a_variant_replace_those_of_all():
    bench = object.__new__(Bench)
    bench.base = ["run=a", "sampler=ddim", "sampler.eta=1", "sampler.steps=5", "n=3"]
    assert bench.options(["sampler.steps=9"]) == [
        *("run=a", "sampler=ddim", "sampler.eta=1", "n=3"),
        "sampler.steps=9",
    ]
    assert bench.options(["sampler=heun"]) == ["run=a", "n=3", "sampler=heun"]


def scored(effects: torch.Tensor, value: float = 0.0, seed: int = 0) -> Scored:
    interval = by_influences(value, effects)
    return Scored(value, interval, effects, len(effects), seed, 1, 0, Record({}, {}))


def test_differences_on_common_noise_are_compared_image_by_image():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(400, generator=generator, dtype=torch.float64)
    own = torch.randn(400, generator=generator, dtype=torch.float64)
    a, b = scored(common, 1.0), scored(common + 0.1 * own, 1.5)
    change, half = b.minus(a)
    assert change == 0.5
    assert half == pytest.approx(1.96 * 0.1 / 20, rel=0.1)
    # other noise: the intervals add up
    _, apart = scored(common + 0.1 * own, 1.5, seed=1).minus(a)
    assert apart == pytest.approx(1.96 * math.sqrt(2) / 20, rel=0.1)
    # a part of the same images: the mean over 400 minus that over the first 100
    _, nested = scored(common[:100]).minus(scored(common))
    assert nested == pytest.approx(1.96 * math.sqrt(1 / 100 - 1 / 400), rel=0.2)


def test_the_usual_grid_has_no_intervals_of_scale_one():
    grid = ["guidance.scale=1,1.5", "guidance.interval=null,[0.2,5]", "sampler.steps=5,10"]
    found = without_repeats([Candidate(*each) for each in combinations(grid)])
    assert len(found) == 6
    assert {c.varied[1] for c in found if c.varied[0] == "guidance.scale=1"} == {"guidance.interval=null"}


def test_rungs_double():
    assert rungs(1000) == [63, 125, 250, 500, 1000]
    assert rungs(500) == [32, 63, 125, 250, 500]
    assert rungs(40) == [40]
    assert rungs(2000, least=500) == [500, 1000, 2000]


def test_a_search_keeps_to_its_budget():
    """Whatever the scores: all on the first rung, then the best, as many as the budget allows."""
    for budget in (0.15, 0.2, 0.5):
        for order in (1, -1):
            candidates = [Candidate((), (), cost=cost) for cost in list(range(1, 101))[::order]]
            alive, sizes = candidates, rungs(512)
            for rung, size in enumerate(sizes):
                for candidate in alive:
                    candidate.scored = scored(torch.zeros(size))
                if rung + 1 < len(sizes):
                    left = budget * 512 * 5050 - sum(c.scored.n * c.cost for c in candidates)
                    alive = affordable(alive, sizes[rung + 1 :], left)
            assert alive[0] is candidates[0]
            assert alive[0].scored.n == 512
            assert sum(c.scored.n * c.cost for c in candidates) <= budget * 512 * 5050
