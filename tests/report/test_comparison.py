"""Which options differ, and which scores share a column."""

import re

import pytest

from src.errors import UserError
from src.evaluation.record import Record
from src.report.comparison import Comparison
from src.report.figures import front
from src.report.page import page, write_report
from src.report.protocol import higher_is_better
from src.report.subjects import subjects_of
from src.report.texts import concise, in_words
from src.runs.files import write_json
from tests.report.simulated import protocol, write_run, write_sweep


def compared(*places):
    return Comparison(subjects_of(places))


def scored(comparison, score="fd_digits"):
    """The columns of a score, each with the names of its rows."""
    return [
        [row.subject.name for row in comparison.rows if column in row.cells]
        for column in comparison.columns
        if column.score == score
    ]


def test_the_options_of_a_sweep_are_those_that_were_typed(tmp_path):
    sweep = write_sweep(
        tmp_path / "sweep", schedule=["linear", "cosine"], parameterization=["eps", "v"], seed=[0, 1]
    )
    found = compared(sweep)
    assert found.options == {
        "schedule": ["cosine", "linear"],
        "parameterization": ["eps", "v"],
        "seed": ["0", "1"],
    }
    assert len(found.rows) == 8
    assert [len(names) for names in scored(found)] == [8]
    assert found.rows[0].setting == {"schedule": "linear", "parameterization": "eps"}


def test_single_runs_differ_by_class_and_by_argument(tmp_path):
    first = write_run(tmp_path / "first")
    second = write_run(
        tmp_path / "second",
        6.0,
        schedule={"_target_": "src.diffusion.schedule.Linear", "T": 1000},
        optimizer__lr=1e-4,
    )
    third = write_run(tmp_path / "third", 7.0, schedule__s=0.01, runs="elsewhere", ckpt="a file")
    options = [subject.options for subject in compared(first, second, third).subjects]
    assert [each["schedule"] for each in options] == ["Cosine(s=0.008)", "Linear", "Cosine(s=0.01)"]
    assert [each["optimizer.lr"] for each in options] == ["0.001", "0.0001", "0.001"]
    assert all(set(each) == {"schedule", "optimizer.lr"} for each in options)


@pytest.mark.parametrize(
    "change",
    [
        {"num_images": 999},
        {"reference__fingerprint": "other"},
        {"reference__count": 1503},
        {"features__sha256": "other"},
        {"settings": {"subset_size": 100}},
        {"quantisation": "truncate"},
        {"recipe__weights": "raw"},
        {"recipe__sampler": "DDPM()"},
        {"recipe__steps": 20},
        {"recipe__labels": "image i has label i mod 10"},
        {"recipe__guidance": "ClassifierFree(scale=2)"},
        {"recipe__seed": 1},
        {"precision": "bf16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_scores_with_other_protocols_are_in_other_columns(tmp_path, change):
    for name, changes in (("first", {}), ("second", {}), ("other", change)):
        write_run(tmp_path / name)
        Record({"fd_digits": 5.0}, protocol(**changes)).write(tmp_path / name / "scores.json")
    found = compared(tmp_path)
    assert scored(found) == [["first", "second"], ["other"]]
    columns = [column for column in found.columns if column.score == "fd_digits"]
    key = next(iter(change)).replace("__", ".")
    assert {key} <= {name.partition(".subset")[0] for name in found.differences(columns)[columns[1]]}


@pytest.mark.parametrize(
    "change",
    [{"versions": {"torch": "3"}}, {"recipe__training_steps": 200}, {"features__origin": "elsewhere"}],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_matter_does_not_divide_a_column(tmp_path, change):
    for name, changes in (("first", {}), ("other", change)):
        Record({"fd_digits": 5.0}, protocol(**changes)).write(write_run(tmp_path / name) / "scores.json")
    assert scored(compared(tmp_path)) == [["first", "other"]]


def test_sets_of_given_images_share_a_column(tmp_path):
    for name, count in (("ours", 1000), ("theirs", 1000), ("few", 999)):
        images = {"from": name, "number": count, "shape": [1, 8, 8], "files_left_out": 0, "sha256": name}
        Record({"fd_digits": 5.0}, protocol(images=images, num_images=count)).write(tmp_path / f"{name}.json")
    found = compared(*(tmp_path / f"{name}.json" for name in ("ours", "theirs", "few")))
    assert scored(found) == [["ours", "theirs"], ["few"]]


def test_a_score_without_a_protocol_is_comparable_with_none(tmp_path):
    write_run(tmp_path / "first")
    write_json(write_run(tmp_path / "second") / "scores.json", {"fd_digits": 4.0})
    assert scored(compared(tmp_path)) == [["first"], ["second"]]


def test_one_checkpoint_sampled_in_several_ways_is_one_column(tmp_path):
    run = write_run(tmp_path / "run")
    for steps in (10, 20):
        record = Record(
            {"fd_digits": 100 / steps}, protocol(recipe__steps=steps, recipe__network_evaluations=steps)
        )
        record.write(run / "scores" / f"ddim-{steps}" / "scores.json")
    found = compared(run)
    assert found.options == {"steps": ["10", "20", "50"]}
    assert [len(names) for names in scored(found)] == [3]
    assert sorted(row.evaluations for row in found.rows) == [10, 20, 50]


def test_a_sweep_of_evaluations_finds_the_records_of_its_jobs(tmp_path):
    run, sweep = write_run(tmp_path / "run"), tmp_path / "sweep"
    jobs = []
    for number, steps in enumerate((10, 20)):
        record = Record({"fd_digits": 100 / steps}, protocol(recipe__steps=steps))
        record.write(run / "scores" / f"ddim-{steps}" / "scores.json")
        job = f"{number}_sampler.steps-{steps}"
        overrides = [f"run={run}", f"sampler.steps={steps}"]
        jobs.append({"folder": job, "overrides": overrides, "varied": overrides[1:]})
        write_json(sweep / job / "outcome.json", {"overrides": overrides, "scores": record.scores})
    write_json(sweep / "jobs.json", {"entry_point": "evaluate", "overrides": [], "jobs": jobs})
    found = compared(sweep)
    assert [len(names) for names in scored(found)] == [2], "and not the record of the training"
    assert found.options == {"steps": ["10", "20"]}


def test_jobs_of_a_sweep_of_evaluations_with_equal_scores_are_all_there(tmp_path):
    run, sweep = write_run(tmp_path / "run"), tmp_path / "sweep"
    jobs = []
    for number, steps in enumerate((1, 2, 3)):
        record = Record({"accuracy_digits": 0.1}, protocol(recipe__steps=steps))
        job = f"{number}_sampler.steps-{steps}"
        overrides = [f"run={run}", f"sampler.steps={steps}"]
        jobs.append({"folder": job, "overrides": overrides, "varied": overrides[1:]})
        for folder in (run / "scores" / f"ddim-{steps}", sweep / job):
            record.write(folder / "scores.json")
        write_json(sweep / job / "outcome.json", {"overrides": overrides, "scores": record.scores})
    write_json(sweep / "jobs.json", {"entry_point": "evaluate", "overrides": [], "jobs": jobs})
    assert compared(sweep).options == {"steps": ["1", "2", "3"]}
    assert len(scored(compared(sweep), "accuracy_digits")[0]) == 3
    (run / "scores").rename(tmp_path / "moved")
    assert len(scored(compared(sweep), "accuracy_digits")[0]) == 3
    outside, link = tmp_path / "moved" / "ddim-1" / "scores.json", sweep / jobs[0]["folder"] / "scores.json"
    link.unlink()
    link.symlink_to(outside)
    (subject,) = compared(sweep).subjects
    assert len(subject.records) == 2
    assert "link out of" in subject.run.problems[0]


def test_a_sweep_over_given_images_is_compared(tmp_path):
    jobs = []
    for number, name in enumerate(("ours.npz", "theirs.npz")):
        record = Record({"fd_digits": 5.0}, protocol(images={"from": name, "sha256": name}))
        job, overrides = f"{number}_images-{name}", [f"images={name}", "reference=digits"]
        jobs.append({"folder": job, "overrides": overrides, "varied": overrides[:1]})
        for folder in (tmp_path / "runs" / "scores" / name, tmp_path / "runs" / "sweeps" / "first" / job):
            record.write(folder / "scores.json")
    sweep = tmp_path / "runs" / "sweeps" / "first"
    write_json(sweep / "jobs.json", {"entry_point": "evaluate", "overrides": [], "jobs": jobs})
    found = compared(sweep)
    assert found.options == {"images": ["ours.npz", "theirs.npz"]}
    assert [row.subject.name for row in found.rows] == ["0: ours.npz", "1: theirs.npz"]
    assert write_report(found.subjects, tmp_path / "report.html").is_file()
    assert len(compared(tmp_path / "runs").subjects) == 2, "the copies are not further records"


def in_table(*places):
    """The scores in the tables of the page."""
    section = page(subjects_of(places)).partition('<section id="scores">')[2].partition("</section>")[0]
    return sorted(map(float, re.findall(r'data-value="(.*?)"', section)))


def write_further(run, name, score, **changes):
    Record({"fd_digits": score}, protocol(**changes)).write(run / "scores" / name / "scores.json")


def test_sampling_seeds_of_trainings_with_different_seeds_are_rows(tmp_path):
    sweep, jobs = tmp_path / "sweep", []
    for number, name in enumerate("ab"):
        run = write_run(tmp_path / name, seed=number)
        for seed in (1, 2):
            record = Record({"fd_digits": 10.0 * (number + 1) + seed}, protocol(recipe__seed=seed))
            job, overrides = f"{len(jobs)}_run-{name}_seed-{seed}", [f"run={run}", f"seed={seed}"]
            jobs.append({"folder": job, "overrides": overrides, "varied": overrides})
            record.write(sweep / job / "scores.json")
    write_json(sweep / "jobs.json", {"entry_point": "evaluate", "overrides": [], "jobs": jobs})
    found = compared(sweep)
    assert found.options == {"seed": ["0", "1"], "sampling seed": ["1", "2"]}
    assert [len(names) for names in scored(found)] == [4]
    assert in_table(sweep) == [11, 12, 21, 22]


def test_further_sampling_seeds_of_one_job_of_a_sweep_over_the_seed_are_rows(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", schedule=["cosine"], parameterization=["eps"], seed=[0, 1])
    for seed in (1, 2):
        write_further(next(sweep.glob("0_*")), f"seed-{seed}", 20.0 + seed, recipe__seed=seed)
    found = compared(sweep)
    assert sorted(row.seed for row in found.rows) == ["0,0", "0,1", "0,2", "1,0"]
    assert [len(names) for names in scored(found)] == [4]
    assert {5, 5.1, 21, 22} <= set(in_table(sweep))


@pytest.mark.parametrize(
    ("first", "second", "further"),
    [
        (
            {},
            {"sampler": {"_target_": "src.diffusion.sampler.DDPM", "steps": 50}},
            {"recipe__sampler": "DDPM()", "recipe__steps": 10},
        ),
        (
            {"ema": {"_target_": "src.training.ema.Fixed"}},
            {"ema": {"_target_": "src.training.ema.Other"}},
            {"recipe__weights": "raw", "recipe__ema_decay": None},
        ),
        (
            {"conditioning": {"_target_": "src.conditioning.conditioning.One"}},
            {"conditioning": {"_target_": "src.conditioning.conditioning.Other"}},
            {"recipe__labels": "image i has label 3"},
        ),
    ],
    ids=["sampler", "ema", "conditioning"],
)
def test_an_option_of_the_trainings_hides_no_further_sampling(tmp_path, first, second, further):
    runs = [write_run(tmp_path / name, **options) for name, options in (("a", first), ("b", second))]
    for run in runs:
        Record({"fd_digits": 5.0}, protocol(recipe__labels="balanced")).write(run / "scores.json")
    write_further(runs[0], "other", 99.0, **({"recipe__labels": "balanced"} | further))
    found = compared(tmp_path)
    assert scored(found) == [["a", "a", "b"]]
    assert in_table(tmp_path) == [5, 5, 99]
    (option,) = found.subjects[0].options
    kept = [(row.subject.name, row.options[option]) for row in found.rows]
    assert len(set(kept)) == 2, "what was trained is still there"


def test_the_sampler_of_a_record_without_a_run_is_not_what_was_trained_with(tmp_path):
    first = write_run(tmp_path / "a")
    write_run(tmp_path / "b", sampler={"_target_": "src.diffusion.sampler.DDPM", "steps": 50})
    write_further(first, "ddpm", 99.0, recipe__sampler="DDPM()")
    Record({"fd_digits": 1.0}, protocol(recipe__sampler="DDPM()")).write(tmp_path / "other.json")
    found = compared(tmp_path / "a", tmp_path / "b", tmp_path / "other.json")
    (other,) = (row for row in found.rows if row.subject.name == "other")
    assert "sampler" not in other.options
    assert other.options["sampling sampler"] == "DDPM"


def test_different_scores_with_equal_options_are_numbered_rows(tmp_path):
    run = write_run(tmp_path / "run")
    for number, value in enumerate((5.0, 7.0, 8.0, 7.0)):
        write_further(run, f"again-{number}", value, versions={"torch": str(number)})
    found = compared(run)
    assert found.options == {"record": ["2", "3", "–"]}
    assert [len(row.records) for row in found.rows] == [2, 2, 1]
    assert [row.setting for row in found.rows] == [{}, {}, {}], "a repetition is no setting"
    assert {5, 7, 8} <= set(in_table(run))


def test_a_record_without_an_entry_that_is_an_option_has_another_column(tmp_path):
    run = write_run(tmp_path / "run")
    write_further(run, "ddim-10", 9.0, recipe__steps=10)
    unknown = protocol()
    del unknown["recipe"]["steps"]
    Record({"fd_digits": 1.0}, unknown).write(tmp_path / "other.json")
    found = compared(run, tmp_path / "other.json")
    assert scored(found) == [["run", "run"], ["other"]]
    columns = [column for column in found.columns if column.score == "fd_digits"]
    heads = [found.differences(columns)[column] for column in columns]
    assert heads == [{"recipe.steps": "as in the row"}, {"recipe.steps": "–"}]


def test_validation_losses_of_different_losses_are_in_different_columns(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", schedule=["cosine"], parameterization=["eps", "v"], seed=[0, 1])
    assert [len(names) for names in scored(compared(sweep), "val/loss_ema")] == [2, 2]


def test_several_scores_of_one_record_have_their_own_protocols(tmp_path):
    def both(fid):
        parts = {"fid": {"name": fid, "sha256": fid}, "precision_vgg": {"name": "vgg", "sha256": "v"}}
        return protocol(
            features=parts,
            settings={"fid": {}, "precision_vgg": {}},
            reference={name: {"count": 5} for name in parts},
        )

    scores = {"fid": 1.0, "precision_vgg": 0.5, "recall_vgg": 0.4}
    for name in ("first", "second"):
        Record(scores, both(name)).write(write_run(tmp_path / name) / "scores.json")
    found = compared(tmp_path)
    assert scored(found, "fid") == [["first"], ["second"]]
    assert scored(found, "recall_vgg") == [["first", "second"]]


def test_places_without_anything_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no run, no sweep and no record"):
        compared(tmp_path / "empty")
    with pytest.raises(UserError, match="gone: no such file or folder"):
        compared(tmp_path / "gone")
    with pytest.raises(UserError, match="score=fid: no such score; there is fd_digits"):
        compared(write_run(tmp_path / "run")).lead("fid")


def test_a_record_without_a_run_is_compared_too(tmp_path):
    Record({"fd_digits": 3.0}, protocol()).write(tmp_path / "others.json")
    found = compared(write_run(tmp_path / "run"), tmp_path / "others.json")
    assert scored(found) == [["run", "others"]]


def test_texts_are_short():
    assert (
        in_words({"schedule": "cosine", "optimizer.lr": "0.001", "compile": "true"})
        == "cosine, lr 0.001, compile true"
    )
    assert concise(["A(x=1, y=(2, 3))", "A(x=2, y=(2, 3))", "B(z=1)", "none"]) == {
        "A(x=1, y=(2, 3))": "A(x=1)",
        "A(x=2, y=(2, 3))": "A(x=2)",
        "B(z=1)": "B",
        "none": "none",
    }


def test_the_direction_of_a_score_is_stored_and_known_by_name_in_earlier_records():
    stored = {"mine": True, "kid": False, "precision_vgg": True, "plain": None}
    new = Record({}, protocol(higher_is_better=stored))
    names = (
        "mine",
        "mine/class_3",
        "recall_vgg",
        "kid",
        "kid_std",
        "kid_std/class_3",
        "plain",
        "mine_too",
        "val/loss",
    )
    found = [higher_is_better(name, new) for name in names]
    assert found == [True, True, True, False, None, None, None, None, False]
    old = Record({}, protocol())
    assert not any(higher_is_better(name, old) for name in ("fid", "kid", "bits_per_dim", "val/loss"))
    assert higher_is_better("inception_score_std", old) is None
    assert all(
        higher_is_better(name, old) for name in ("precision_digits", "accuracy_digits", "inception_score")
    )
    assert higher_is_better("membership_p_pixels", Record({}, {"memorisation": {}})) is None


def test_a_page_marks_the_best_in_the_direction_of_the_record(tmp_path):
    for name, value in (("first", 1.0), ("second", 2.0)):
        record = Record({"mine": value, "kid_std": value}, protocol(higher_is_better={"mine": True}))
        record.write(write_run(tmp_path / name) / "scores.json")
    text = page(subjects_of([tmp_path]))
    assert "mine: higher is better" in text
    assert re.findall(r'class="num best" data-value="(.*?)"', text) == ["2.0"], "none of a standard deviation"


def test_the_pareto_front():
    points = [(10.0, 5.0), (20.0, 3.0), (20.0, 4.0), (50.0, 3.0), (5.0, 9.0)]
    assert front(points, higher_is_better=False) == [4, 0, 1]
    assert front([(10.0, 0.5), (5.0, 0.9)], higher_is_better=True) == [1]
