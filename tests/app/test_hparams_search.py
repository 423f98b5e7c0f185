"""The search of hyperparameters: spaces, restarts, seeds, pruning, several objectives, and its messages."""

import json
import math
from types import SimpleNamespace

import optuna
import pytest

from src.app.build import build
from src.app.options import CONF
from src.app.sweep import launcher as launchers
from src.app.sweep import run as sweeps
from src.app.sweep.hparams_search import HparamsSearch, space_of
from src.app.sweep.jobs import composed
from src.app.sweep.run import run_sweep
from src.errors import UserError
from src.training.study import STUDY_FILE, repair, storage_of
from src.training.trial import report_of


class Killed(BaseException):
    """As if the process ended."""


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Jobs whose score is a formula of their options; `jobs.killed_at` ends the launcher before a job."""
    record = SimpleNamespace(run=[], killed_at=None, bad=())

    def job(entry_point, arguments):
        if len(record.run) == record.killed_at:
            record.killed_at = None
            raise Killed
        options = dict(argument.split("=", 1) for argument in arguments)
        record.run.append(options)
        if options["schedule"] in record.bad:
            raise UserError("this schedule is bad")
        lr, seed = float(options["optimizer.lr"]), int(options.get("seed", 0))
        steps = int(options.get("sampler.steps", 5))
        score = (math.log10(lr) + 2) ** 2 + 0.5 * (options["schedule"] == "linear") + 0.1 * seed + 1 / steps
        return {"fd_digits": score, "val/loss": 1.0, "evaluations": float(steps)}

    monkeypatch.setattr(launchers, "run_single", job)
    monkeypatch.setattr(sweeps, "_checked", lambda job, elsewhere: (job, None))
    base = ("logger=csv", f"runs={tmp_path}", "hparams_search=optuna", "schedule=linear,cosine")
    record.start = lambda *options: run_sweep(
        "train", [*base, "optimizer.lr=tag(log,interval(1e-4,1e-1))", *options]
    )
    record.trials = lambda: json.loads(max(tmp_path.glob("sweeps/*/search.json")).read_text())["trials"]
    return record


def test_a_range_may_begin_at_zero():
    space = space_of(
        ["conditioning.dropout=interval(0,0.3)", "model.depth=int(interval(0,4))"], HparamsSearch()
    )
    assert set(space.example()) == {"conditioning.dropout=0.0", "model.depth=0"}


def test_the_space_is_read_from_the_command_line():
    search = HparamsSearch(space={"schedule": "linear,cosine", "optimizer.lr": "interval(0.1,1)"})
    overrides = ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "sampler.steps=range(5,20,5)", "batch_size=8"]
    space = space_of([*overrides, "seed=3,4", "model.depth=int(interval(1,4))"], search)
    assert space.fixed == ("batch_size=8",)
    assert space.seeds == (("seed=3",), ("seed=4",))
    assert space.searched == {
        "schedule": optuna.distributions.CategoricalDistribution(["linear", "cosine"]),
        "optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "sampler.steps": optuna.distributions.IntDistribution(5, 15, step=5),
        "model.depth": optuna.distributions.IntDistribution(1, 4),
    }
    with pytest.raises(UserError, match="no option to search"):
        space_of(["seed=0,1", "batch_size=8"], HparamsSearch())
    with pytest.raises(UserError, match=r"optimizer\.lr=interval"):
        space_of(["optimizer.lr=interval(1.0,0.5)"], HparamsSearch())


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONF / "hparams_search").glob("*.yaml")))
def test_every_choice_is_built(choice):
    node = composed("train", [f"hparams_search={choice}"]).hparams_search
    search = build(node, HparamsSearch, "hparams_search")
    assert search.objectives == ["score"]
    if choice != "optuna":
        assert space_of([], search).searched


def test_seeds_are_averaged_and_a_search_finds_the_minimum(jobs):
    assert jobs.start("seed=0,1", "hparams_search.trials=25") == 0
    trials = jobs.trials()
    assert len(trials) == 25
    assert len(jobs.run) == 50
    (best,) = (trial for trial in trials if trial["best"])
    assert best["params"]["schedule"] == "cosine"
    expected = (math.log10(best["params"]["optimizer.lr"]) + 2) ** 2 + 0.05 + 0.2
    assert best["values"] == [pytest.approx(expected)]
    assert best["values"][0] == min(trial["values"][0] for trial in trials) < 0.3


def test_a_killed_search_continues_with_the_same_trials(jobs, tmp_path):
    jobs.start("seed=0,1", "hparams_search.trials=6")
    undisturbed = jobs.trials()
    for folder in tmp_path.glob("sweeps/*"):
        folder.rename(tmp_path / "before")
    jobs.run.clear()
    for place in (1, 7):  # in the middle of a trial, and of another one
        jobs.killed_at = place
        with pytest.raises(Killed):
            jobs.start("seed=0,1", "hparams_search.trials=6")
    jobs.start("seed=0,1", "hparams_search.trials=6")
    assert len(list(tmp_path.glob("sweeps/*"))) == 1
    assert jobs.trials() == undisturbed
    assert len(jobs.run) == 12, "a job was run twice"
    # more trials continue the same search
    jobs.start("seed=0,1", "hparams_search.trials=8")
    longer = jobs.trials()
    assert [trial["values"] for trial in longer[:6]] == [trial["values"] for trial in undisturbed]
    assert len(longer) == 8


def test_a_failing_setting_does_not_end_the_search(jobs):
    jobs.bad = ("linear",)
    assert jobs.start("hparams_search.trials=8") > 0
    states = {trial["params"]["schedule"]: trial["state"] for trial in jobs.trials()}
    assert states == {"linear": "fail", "cosine": "complete"}
    assert {trial.get("error") for trial in jobs.trials()} == {None, "this schedule is bad"}


def test_two_objectives_give_the_trials_that_no_other_beats(jobs, capsys):
    objectives = "hparams_search.objectives=[score,evaluations]"
    jobs.start(objectives, "sampler.steps=range(1,40)", "hparams_search.trials=15")
    trials = jobs.trials()
    for trial in trials:
        better = [
            other
            for other in trials
            if all(a <= b for a, b in zip(other["values"], trial["values"], strict=True))
            and other["values"] != trial["values"]
        ]
        assert trial["best"] == (not better)
    assert "no other trial is better in all objectives" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hparams_search.objectives=[fid]"], "no fid in the scores of a job; there is fd_digits"),
        (["hparams_search.trials=0"], "trials must be at least 1"),
        (["hparams_search.objectives=[score,score]"], "must differ"),
        (["rerun_failed=true"], "a search does not repeat"),
    ],
)
def test_mistakes_are_one_line(jobs, options, message):
    with pytest.raises(UserError, match=message) as error:
        jobs.start(*options)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(jobs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna.storages", None)
    with pytest.raises(UserError, match=r"optuna is missing.*\[search\]"):
        jobs.start()


def test_a_cut_off_line_of_the_study_is_removed(tmp_path):
    storage = storage_of(tmp_path)
    optuna.create_study(study_name="search", storage=storage)
    whole = (tmp_path / STUDY_FILE).read_bytes()
    (tmp_path / STUDY_FILE).write_bytes(whole + b'{"op_code":4,"wor')
    repair(tmp_path)
    assert (tmp_path / STUDY_FILE).read_bytes() == whole


def test_a_training_worse_than_the_median_is_pruned(tmp_path):
    study = optuna.create_study(study_name="search", storage=storage_of(tmp_path), direction="minimize")
    for value in (1.0, 2.0, 3.0):
        trial = study.ask()
        trial.report(value, 10)
        study.tell(trial, value)

    def reported(value: float) -> bool:
        number = study.ask().number
        folder = tmp_path / str(number)
        folder.mkdir()
        content = {"trial": number, "objective": "val/loss", "prune_after": 2}
        (folder / "trial.json").write_text(json.dumps(content))
        callback = report_of(folder)
        strategy = SimpleNamespace(broadcast=lambda value: value)
        trainer = SimpleNamespace(
            global_step=10, max_steps=20, is_global_zero=True, strategy=strategy, should_stop=False
        )
        trainer.callbacks, trainer.callback_metrics = [callback], {"val/loss": value}
        callback.on_train_batch_end(trainer, None, None, None, 0)
        assert study.trials[number].intermediate_values == {10: value}
        assert study.trials[number].user_attrs.get("pruned_at") == (10 if trainer.should_stop else None)
        return trainer.should_stop

    assert not reported(1.9)
    assert reported(2.1)
    assert report_of(tmp_path) is None
