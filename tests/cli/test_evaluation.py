"""src.evaluate with given images, src.explain and src.search, from the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.digits import Digits
from tests.cli.test_bad_input import assert_one_line
from tests.conftest import QUICK, commands_in


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short class-conditional run that can be guided and has snapshots of averages."""
    tmp_path = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        options = ["conditioning=class", "conditioning.dropout=0.1", "metrics=none"]
        assert commands_in(tmp_path, patch)("train", *QUICK, *options) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


@pytest.fixture
def images(tmp_path):
    """200 digits as an .npz file, and their pixels."""
    pixels = Digits().split("train").images(range(200))
    np.savez(tmp_path / "some.npz", pixels.permute(0, 2, 3, 1).numpy())
    return pixels


def record_in(folder):
    (path,) = folder.glob("scores/*/scores.json")
    return json.loads(path.read_text())


def test_given_images_are_scored_without_a_run(command, images, tmp_path, capsys):
    assert command("evaluate", "images=some.npz", "reference=digits", "batch_size=64") == 0
    record = record_in(tmp_path / "runs")
    low, high = record["intervals"]["fd_digits"]
    assert low < record["scores"]["fd_digits"] < high
    assert " ± " in capsys.readouterr().out
    protocol = record["protocol"]
    assert protocol["num_images"] == 200
    assert protocol["reference"]["split"] == "train"
    assert protocol["images"]["number"] == 200
    # the same images as a folder, with themselves
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{number:03d}.png")
    options = ["images=pictures", "reference=some.npz", "metrics=[fd_digits,density_coverage_digits]"]
    assert command("evaluate", *options, "runs=others") == 0
    scores = record_in(tmp_path / "others")["scores"]
    assert scores == pytest.approx({"fd_digits": 0, "density_digits": 1, "coverage_digits": 1}, abs=1e-6)


@pytest.mark.slow
def test_a_sweep_over_given_images_has_intervals_and_a_report(command, images, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", images[:150, 0].numpy())
    assert command("evaluate", "-m", "images=some.npz,other.npz", "reference=digits") == 0
    assert "±" in capsys.readouterr().out.rpartition("jobs)")[2], "in the table, too"
    (page,) = tmp_path.glob("runs/sweeps/*/report.html")
    assert "other.npz" in page.read_text()


def test_published_statistics_are_a_reference(command, images, tmp_path):
    from src.metrics.features import ClassifierFeatures

    train = Digits().split("train")
    features = ClassifierFeatures("digits")(train.images(range(len(train)))).numpy().astype(np.float64)
    np.savez(tmp_path / "reference.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    for reference, runs in (("digits", "a"), ("reference.npz", "b")):
        options = ["images=some.npz", f"reference={reference}", "metrics=fd_digits", f"runs={runs}"]
        assert command("evaluate", *options) == 0
    a, b = (record_in(tmp_path / runs)["scores"]["fd_digits"] for runs in "ab")
    assert a == pytest.approx(b, rel=1e-6)


def test_stale_statistics_are_computed_again_and_said(command, images, tmp_path, capsys):
    command_line = ["evaluate", "images=some.npz", "reference=given.npz", "metrics=fd_digits"]
    for count, said in ((150, False), (150, False), (140, True)):
        np.savez(tmp_path / "given.npz", images[:count, 0].numpy())
        assert command(*command_line) == 0
        output = capsys.readouterr()
        text = "the stored statistics of given.npz (all) are of other images (150, now 140): computing them again"
        assert (text in output.out + output.err) == said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["run is missing", "images="]),
        (["run=a", "images=some.npz"], ["not both"]),
        (["images=some.npz", "metrics=fd_digits"], ["reference is missing", "fd_digits"]),
        (["images=some.npz", "reference=some.npz"], ["metrics: choose"]),
        (
            ["images=some.npz", "reference=nowhere", "metrics=fd_digits"],
            ["reference=nowhere", "no such folder"],
        ),
        (["images=some.npz", "reference=test", "metrics=fd_digits"], ["reference=test", "digits/test"]),
        (
            ["images=some.npz", "reference=digits/foo", "metrics=fd_digits"],
            ["reference=digits/foo", "no such split", "digits/train"],
        ),
        (
            ["images=some.npz", "reference=one.npz", "metrics=fd_digits"],
            ["at least 2 images, but reference=one.npz has 1"],
        ),
        (
            [
                "images=some.npz",
                "reference=digits",
                "metrics=[fd_digits,kid]",
                "metrics.kid.features.weights=nowhere.pth",
            ],
            ["metrics.kid.features.weights=nowhere.pth: no such file"],
        ),
        (
            ["images=some.npz", "reference=digits", "metrics=memorisation_digits"],
            ["metrics: memorisation is only for src.evaluate run=<run>"],
        ),
        (["images=some.npz", "reference=fashion_mnist", "metrics=fd_digits"], ["28 x 28", "8 x 8", "resize"]),
        (
            ["images=some.npz", "reference=wide.npz", "metrics=fd_digits"],
            ["9 x 8 grey", "8 x 8 grey", "resize"],
        ),
        (["images=wide.npz", "reference=digits", "metrics=fd_digits"], ["(1, 8, 9)"]),
        (["images=some.npz", "reference=moments.npz", "metrics=fd_digits"], ["mu has 3 features", "64"]),
        (
            ["images=some.npz", "reference=moments.npz", "metrics=precision_recall_digits"],
            ["has only mu and sigma", "images"],
        ),
        (["images=moments.npz", "reference=digits"], ["images=moments.npz", "give images"]),
        (["images=some.npz", "reference=digits", "n=201"], ["n=201", "200 images"]),
        (
            ["images=some.npz", "reference=digits", "sampler.steps=3"],
            ["sampler", "no effect on given images"],
        ),
        (["images=some.npz", "reference=digits", "metrics=kd_digits"], ["at least 500 images", "has 200"]),
        (
            ["images=some.npz", "reference=digits", "metrics=fd_digits_infinity"],
            ["at least 650 images (64 features, smallest_share=0.1)", "has 200"],
        ),
        (["images=some.npz", "reference=digits", "metrics=accuracy_digits"], ["accuracy_digits"]),
        (["images=some.npz", "reference=digits", "per_class=true"], ["per_class=true"]),
    ],
)
@pytest.mark.usefixtures("images")
def test_bad_input_is_one_line(command, tmp_path, capsys, options, words):
    np.savez(tmp_path / "wide.npz", np.zeros((3, 8, 9), dtype=np.uint8))
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8), dtype=np.uint8))
    assert command("evaluate", *options) == 2
    err = capsys.readouterr().err
    assert_one_line(err, words)
    assert ("give more images" in err) == ("needs at least" in err)


@pytest.mark.usefixtures("images")
def test_scores_of_classes_need_a_reference_with_classes(tmp_path):
    from src.app.evaluate import reference_of
    from src.errors import UserError
    from src.evaluation.scores import ScoreSet
    from src.metrics.features import ClassifierFeatures
    from src.metrics.fidelity import Accuracy, FrechetDistance

    features = ClassifierFeatures("digits")
    np.savez(tmp_path / "moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    for name in ("some.npz", "moments.npz"):
        path = str(tmp_path / name)
        with pytest.raises(UserError, match=f"^per_class=true: reference={path} has no classes"):
            reference_of(path, ScoreSet([FrechetDistance(features)], num_classes=2), None, (1, 8, 8))
        for scores in (ScoreSet([FrechetDistance(features)]), ScoreSet([Accuracy(features)], num_classes=2)):
            assert reference_of(path, scores, None, (1, 8, 8)).name == name


@pytest.mark.parametrize(("broken", "words"), [(1504, "the reference"), (200, "the generated set")])
@pytest.mark.usefixtures("images")
def test_features_that_are_not_finite_are_one_line(command, capsys, monkeypatch, broken, words):
    from src.metrics.classifier import SmallClassifier

    plain, seen = SmallClassifier.features, []

    def features(self, images):
        seen.append(len(images))
        of_the_set = sum(seen[1:]) <= 1504  # after the image on which the metric is tried, the reference
        found = plain(self, images)
        return found * torch.nan if of_the_set == (broken == 1504) and len(seen) > 1 else found

    monkeypatch.setattr(SmallClassifier, "features", features)
    options = ["images=some.npz", "reference=digits", "metrics=fd_digits", "cache=fresh"]
    assert command("evaluate", *options) == 2
    assert_one_line(capsys.readouterr().err, ["fd_digits", f"{words} are not finite; ", "weights"])


def test_explain_finds_what_differs(command, run, tmp_path, capsys):
    theirs = ["sampler.steps=2", "n=80", "seed=0", "bytes=truncate", "guidance.scale=3", "reference=test"]
    common = ["sampler=ddim", "metrics=fd_digits", "batch_size=100"]
    assert command("evaluate", f"run={run}", *common, *theirs) == 0
    record = next(run.glob("scores/ddim-2_*/scores.json"))
    capsys.readouterr()
    mine = ["sampler.steps=4", "n=100"]
    assert command("explain", f"run={run}", f"record={record}", *common, *mine) == 0
    found = json.loads(next(run.glob("scores/explain_*/explain.json")).read_text())
    rows = {row["axis"]: row for row in found["axes"]}
    other = json.loads(record.read_text())["scores"]["fd_digits"]
    assert set(rows) == {"steps", "guidance", "bytes", "reference", "n", "all of them"}
    assert all("change" in row for row in rows.values())
    # no images for axes that change none
    assert [rows[name]["sampled"] for name in ("bytes", "reference", "n")] == [0, 0, 0]
    assert rows["steps"]["sampled"] == 100
    # all choices together are the other evaluation
    assert rows["all of them"]["value"] == pytest.approx(other, rel=1e-4)
    assert rows["all of them"]["share"] == pytest.approx(1, abs=1e-3)
    assert "share of gap" in capsys.readouterr().out
    # again: everything is known
    assert command("explain", f"run={run}", f"record={record}", *common, *mine) == 0
    assert "sampled     0 images" in capsys.readouterr().out


def explained(command, run, tmp_path, recipe, *more, **protocol):
    """Exit status of src.explain with a record written by hand, and the content of explain.json."""
    for old in run.glob("scores/explain_*/explain.json"):
        old.unlink()
    record = tmp_path / "theirs.json"
    protocol = {"recipe": recipe, **protocol}
    record.write_text(json.dumps({"scores": {"fd_digits": 3.0}, "protocol": protocol}))
    options = ["n=64", "sampler=ddim", "sampler.steps=2", "metrics=fd_digits", *more]
    status = command("explain", f"run={run}", f"record={record}", *options)
    return status, "".join(path.read_text() for path in run.glob("scores/explain_*/explain.json"))


@pytest.mark.parametrize(("half", "warned"), [(1e4, True), (1e-4, False)])
def test_explain_warns_about_a_gap_within_the_records_interval(command, run, tmp_path, capsys, half, warned):
    record = tmp_path / "theirs.json"
    content = {"scores": {"fd_digits": 3.0}, "intervals": {"fd_digits": [3 - half, 3 + half]}}
    record.write_text(json.dumps(content | {"protocol": {"recipe": {"steps": 2}}}))
    options = ["n=64", "sampler=ddim", "sampler.steps=2", "metrics=fd_digits"]
    assert command("explain", f"run={run}", f"record={record}", *options) == 0
    assert ("the gap is within the record's interval" in capsys.readouterr().out) == warned


def test_explain_resolves_nothing_from_a_record(command, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", "hunter2secret")
    recipe = {
        "sampler": "DDIM(eta='${oc.env:TOKEN}')",
        "spacing": "Leading(offset='${oc.env:TOKEN}')",
        "clipping": "StaticClipping(bound='${oc.env:TOKEN}') [/red]",
        "guidance": "AutoGuidance(run='${oc.env:TOKEN}', scale=2.0)",
        "labels": "image i has entry i mod 1 of [${oc.env:TOKEN}]",
        "weights": "ema std=${oc.env:TOKEN}",
    }
    status, written = explained(command, run, tmp_path, recipe)
    assert status == 0
    printed = capsys.readouterr()
    assert "hunter2secret" not in printed.out + printed.err + written
    rows = {row["axis"]: row for row in json.loads(written)["axes"]}
    assert set(rows) == set(recipe)
    assert all(row["error"] == "differs, and cannot be made here" for row in rows.values())


@pytest.mark.parametrize(
    ("protocol", "entry"),
    [
        ({"recipe": {"steps": "18 steps"}}, "protocol.recipe.steps"),
        ({"recipe": {"steps": 1.5}}, "protocol.recipe.steps"),
        ({"recipe": {"weights": 0.07}}, "protocol.recipe.weights"),
        ({"recipe": {"sampler": 3}}, "protocol.recipe.sampler"),
        ({"recipe": {"labels": ["a"]}}, "protocol.recipe.labels"),
        ({"recipe": {"seed": "${oc.env:TOKEN}"}}, "protocol.recipe.seed"),
        ({"recipe": "x"}, "protocol.recipe"),
        ({"reference": "cifar10"}, "protocol.reference"),
        ({"reference": {"split": 3}}, "protocol.reference.split"),
        ({"reference": {"fid": {"split": 3}}}, "protocol.reference.fid.split"),
        ({"num_images": "50k"}, "protocol.num_images"),
        ({"quantisation": {}}, "protocol.quantisation"),
    ],
)
def test_a_record_with_a_mistyped_entry_is_one_line(command, run, tmp_path, capsys, protocol, entry):
    status, written = explained(command, run, tmp_path, **{"recipe": {}, **protocol})
    assert (status, written) == (2, "")
    assert_one_line(capsys.readouterr().err, [f"record={tmp_path / 'theirs.json'}: {entry}: "])


def test_missing_entries_of_a_record_are_not_known(command, run, tmp_path):
    status, written = explained(command, run, tmp_path, {"ema_decay": 0.5}, reference={"data": "digits"})
    assert status == 0
    (row,) = json.loads(written)["axes"]
    assert (row["axis"], row["after"]) == ("weights", "not known decay 0.5")
    assert row["error"] == "differs, and cannot be made here"
    # several scores, of which one has no reference
    reference = {"fd_digits": {"data": "digits", "split": "test"}, "accuracy_digits": None}
    status, written = explained(command, run, tmp_path, None, reference=reference)
    assert status == 0
    (row,) = json.loads(written)["axes"]
    assert (row["axis"], row["after"]) == ("reference", "test")
    assert "change" in row


def test_explain_knows_the_split_of_the_metric(command, run, tmp_path):
    reference = {"data": "digits", "split": "train"}
    of_test = "metrics.reference_split=test"
    status, written = explained(command, run, tmp_path, {"note": "[/red]"}, of_test, reference=reference)
    assert status == 0
    axis, note = json.loads(written)["axes"]
    assert (axis["axis"], axis["before"], axis["after"]) == ("reference", "test", "train")
    assert axis["change"]
    assert (note["axis"], note["error"]) == ("recipe.note", "differs, and cannot be made here")
    status, written = explained(command, run, tmp_path, {}, of_test, "axes=steps", reference=reference)
    assert (status, json.loads(written)["axes"]) == (0, [])


def test_explain_compares_precision_and_bytes(run):
    from src.app.bench import Bench
    from src.app.explain import axes_of_record

    loaded, _, config = Bench([f"run={run}", "sampler=ddim", "precision=bf16-mixed"]).load()

    def axes(quantisation, recipe):
        found = axes_of_record(loaded, config, {"quantisation": quantisation, "recipe": recipe})
        return [(axis.name, axis.before, axis.after, axis.options) for axis in found]

    assert axes("bytes as given", {}) == []
    assert axes(loaded.recipe.codec.describe(), {"precision": "bf16-mixed"}) == []
    latents = "AutoencoderKL abc, clip(round((x + 1) * 127.5), 0, 255) to uint8"
    assert axes(latents, {"precision": "32-true"}) == [
        ("precision", "bf16-mixed", "32-true", ("precision=32-true",)),
        ("bytes", "round", latents, None),
    ]


@pytest.mark.parametrize(
    ("guidance", "before", "after", "own"),
    [
        (["guidance=interval"], "[0.2,5.0]", "null", ("guidance=interval",)),
        (
            ["guidance=projected", "guidance.scale=3.5"],
            "null",
            "[0.2,5.0]",
            ("guidance=projected", "guidance.scale=3.5"),
        ),
        (["guidance=auto", "guidance.run=RUN"], "null", "[0.2,5.0]", None),
    ],
)
def test_explain_tries_an_interval_of_the_same_guidance(run, guidance, before, after, own):
    from src.app.bench import Bench
    from src.app.explain import Axis, usual_axes

    guidance = [option.replace("RUN", str(run)) for option in guidance]
    options = [*guidance, "metrics=fd_digits", "metrics.reference_split=test"]
    loaded, merged, config = Bench([f"run={run}", "sampler=ddim", *options]).load()
    axes = {axis.name: axis for axis in usual_axes(loaded, merged, config)}
    interval = f"guidance.interval={after}"
    assert axes["interval"] == Axis("interval", before, after, (interval,))
    assert axes["guidance"].after == "none"
    assert axes["reference"] == Axis("reference", "test", "train", ("reference=train",))
    # the same guidance as the run's own
    config = Bench([f"run={run}", "sampler=ddim"]).config()
    found = [axis.options for axis in usual_axes(loaded, merged, config) if axis.name == "interval"]
    assert found == ([] if own is None else [(*own, interval)])


def test_errors_of_variants_show_no_values_of_the_environment(command, run, tmp_path, capsys, monkeypatch):
    from src.app.bench import Bench
    from src.app.environment import environment
    from src.errors import UserError

    monkeypatch.setenv("TOKEN", "hunter2secret")
    score = Bench.score

    def fails(self, extra=(), n=None):
        if "sampler.steps=3" not in extra:
            return score(self, extra, n)
        with environment.revealed():
            raise UserError(f"no file {environment('TOKEN')}")

    monkeypatch.setattr(Bench, "score", fails)
    status, written = explained(command, run, tmp_path, {"steps": 3})
    assert status == 0
    grid = ["sampler.steps=2,3", "n=64", "metrics=fd_digits", "budget=1"]
    assert command("search", f"run={run}", *grid) == 0
    printed = capsys.readouterr()
    (path,) = run.glob("scores/search_*/search.json")
    written += path.read_text()
    path.unlink()
    assert written.count("no file ${oc.env:TOKEN}") == 2
    assert "hunter2secret" not in printed.out + printed.err + written


def test_explain_without_a_record_tries_the_usual_axes(command, run, capsys):
    options = ["n=80", "sampler.steps=2", "metrics=fd_digits"]
    assert command("explain", f"run={run}", *options, "axes=[weights,bytes]") == 0
    printed = capsys.readouterr().out
    for name in ("weights", "bytes"):
        assert f"scoring     {name}" in printed


def test_explain_tries_raw_weights_and_another_length(run, monkeypatch):
    from src.app.bench import Bench
    from src.app.explain import usual_axes

    bench = Bench([f"run={run}", "sampler=ddim", "sampler.steps=2"])
    loaded, merged, config = bench.load()
    monkeypatch.setattr("src.app.explain.post_hoc.snapshots", lambda folder: [folder / "step_1"])
    for weights, length in (("ema", "0.1"), ("ema std=0.05", "0.1"), ("ema std=0.1", "0.05")):
        axes = usual_axes(replace(loaded, weights=weights), merged, config)
        options = [axis.options for axis in axes if axis.name == "weights"]
        assert options == [("weights=raw",), (f"weights={length}",)]


def test_search_finds_the_best_of_a_small_grid(command, run, capsys):
    grid = ["sampler.steps=1,3", "sampler.eta=0,1", "sampler=ddim", "n=64", "metrics=fd_digits"]
    assert command("search", f"run={run}", *grid, "budget=0.8") == 0
    assert "best        " in capsys.readouterr().out
    found = json.loads(next(run.glob("scores/search_*/search.json")).read_text())
    assert len(found["candidates"]) == 4
    assert found["network_evaluations"] <= 0.8 * found["of_the_full_grid"]
    best = next(row for row in found["candidates"] if row["options"] == found["best"]["options"])
    assert best["n"] == 64
    assert best["value"] == min(row["value"] for row in found["candidates"] if row["n"] == 64)
    # the full grid, where all candidates have all images
    next(run.glob("scores/search_*/search.json")).unlink()
    assert command("search", f"run={run}", *grid, "budget=1") == 0
    everything = json.loads(next(run.glob("scores/search_*/search.json")).read_text())
    assert all(row["n"] == 64 for row in everything["candidates"])
    low, high = everything["best"]["interval"]
    assert low < found["best"]["value"] < high
    assert max(row["value"] for row in everything["candidates"]) > high, "any candidate would do"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain"], ["run is missing"]),
        (["explain", "run=RUN", "axes=[colour]"], ["axes=[colour]", "choose from weights"]),
        (["explain", "run=RUN", "record=nowhere.json"], ["nowhere.json"]),
        (
            ["explain", "run=RUN", "record=theirs.json", "axes=stepz"],
            ["axes=stepz", "no stepz", "weights, steps"],
        ),
        (["search", "run=nowhere"], ["run=nowhere"]),
        (["search", "run=RUN", "n=10,20"], ["n: all combinations have one value"]),
        (["search", "run=RUN", "sampler.steps=1,2", "budget=2"], ["budget=2", "(0, 1]"]),
        (
            ["search", "run=RUN", "sampler.steps=1,2", "n=600", "metrics=kd_digits", "budget=0.2"],
            ["budget=0.2", "first rung of 600 images is 100 % of n=600", "budget=1"],
        ),
    ],
)
def test_bad_commands_are_one_line(command, run, tmp_path, capsys, arguments, words):
    (tmp_path / "theirs.json").write_text('{"scores": {"fd_digits": 3.0}, "protocol": {}}')
    assert command(*(argument.replace("RUN", str(run)) for argument in arguments)) == 2
    assert_one_line(capsys.readouterr().err, words)


def test_search_has_a_usual_grid(run):
    from src.app.bench import Bench
    from src.app.search import usual_grid

    given = [f"run={run}", "sampler.steps=5"]
    assert usual_grid(Bench(given), given) == [
        "weights=ema,raw",
        "guidance.scale=1,1.5,2,3",
        "guidance.interval=null,[0.2,5]",
        "sampler=ddim,ddpm,dpmpp_2m",
    ]


@pytest.mark.parametrize(
    ("given", "varied"),
    [
        (["guidance=classifier_free"], {"weights", "guidance.scale", "guidance.interval"}),
        (["guidance.scale=2"], {"weights", "guidance.interval"}),
        (["guidance=none"], {"weights"}),
        (["guidance=projected"], {"weights"}),
        (["weights=raw", "guidance=auto", "guidance.run=RUN"], set()),
    ],
)
def test_the_usual_grid_has_only_what_the_choices_allow(run, given, varied):
    from src.app.bench import Bench
    from src.app.search import usual_grid

    given = [
        f"run={run}",
        "sampler=ddim",
        "sampler.steps=5",
        *(each.replace("RUN", str(run)) for each in given),
    ]
    assert {option.partition("=")[0] for option in usual_grid(Bench(given), given)} == varied


@pytest.mark.parametrize(
    ("weights", "guidance", "varied"),
    [
        ("raw", None, {"guidance.scale", "guidance.interval"}),
        ("imported", "AutoGuidance", set()),
        ("ema", "ClassifierGuidance", {"weights"}),
        ("ema", "ClassifierFree", {"weights", "guidance.scale", "guidance.interval"}),
    ],
)
def test_the_usual_grid_keeps_to_what_the_run_has(run, monkeypatch, weights, guidance, varied):
    from src.app.bench import Bench
    from src.app.search import usual_grid

    given = [f"run={run}", "sampler=ddim", "sampler.steps=5"]
    bench = Bench(given)
    loaded, merged, config = bench.load()
    merged = merged.copy()
    merged.guidance = guidance and {"_target_": f"src.diffusion.guidance.{guidance}"}
    monkeypatch.setattr(bench, "load", lambda: (replace(loaded, weights=weights), merged, config))
    assert {option.partition("=")[0] for option in usual_grid(bench, given)} == varied


@pytest.mark.parametrize("name", ["explain", "search"])
def test_help(command, capsys, name):
    assert command(name, "--help") == 0
    assert f"python -m src.{name} run=" in capsys.readouterr().out
