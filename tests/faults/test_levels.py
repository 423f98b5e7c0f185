"""How exactly a run goes on is said aloud; another experiment is refused unless it is allowed."""

import pytest
from PIL import Image

from src.training.resume import flat, level
from tests.faults.processes import resume, run, run_folder, train
from tests.faults.states import training_state

ORIGIN = {
    "data": "a" * 64,
    "code": {"model/unet.py": "1"},
    "world_size": 1,
    "accumulation": 1,
    "machine": {"torch": "2.9.0", "device": "cpu", "threads": "1"},
    "config": flat({"seed": 0, "batch_size": 16, "optimizer": {"lr": 0.1}, "logger": {"csv": {"x": 1}}}),
    "deterministic": True,
}


@pytest.mark.parametrize(
    ("change", "expected", "word"),
    [
        ({}, "bit-exact", None),
        ({"config": {**ORIGIN["config"], "logger.csv.x": 2, "trainer.max_steps": 9}}, "bit-exact", None),
        ({"world_size": 2}, "order-exact", "world_size"),
        ({"accumulation": 2}, "order-exact", "accumulation"),
        ({"config": {**ORIGIN["config"], "batch_size": 32}}, "order-exact", "batch_size"),
        ({"machine": {**ORIGIN["machine"], "torch": "2.10.0"}}, "order-exact", "torch: 2.9.0 -> 2.10.0"),
        ({"deterministic": False}, "order-exact", "deterministic"),
        ({"config": {**ORIGIN["config"], "optimizer.lr": 0.2}}, "approximate", "optimizer.lr: 0.1 -> 0.2"),
        ({"config": {**ORIGIN["config"], "seed": 1}}, "approximate", "seed: 0 -> 1"),
        ({"data": "b" * 64}, "approximate", "fingerprint aaaaaaaaaaaa -> bbbbbbbbbbbb"),
        ({"code": {"model/unet.py": "2"}}, "approximate", "src/model/unet.py"),
    ],
)
def test_levels(change, expected, word):
    name, differences = level(ORIGIN, {**ORIGIN, **change})
    assert name == expected
    assert [word in difference for difference in differences] == ([] if word is None else [True])


def test_another_experiment_is_refused(tmp_path):
    assert train(tmp_path, "trainer.max_steps=3").status == 0
    refused = resume(tmp_path, "optimizer.lr=0.5", "trainer.max_steps=4")
    assert refused.status == 2
    assert "optimizer.lr" in refused.output.splitlines()[-1]
    assert "allow_changes=true" in refused.output.splitlines()[-1]
    allowed = resume(tmp_path, "optimizer.lr=0.5", "allow_changes=true", "trainer.max_steps=4")
    assert allowed.status == 0, allowed.output
    assert "approximate from step 3 (optimizer.lr" in allowed.output
    unfit = resume(tmp_path, "model.base_channels=16", "allow_changes=true", "trainer.max_steps=6")
    assert unfit.status == 2
    assert "weights do not fit" in unfit.output.splitlines()[-1]


def test_other_images_are_refused(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(40):
        Image.new("L", (8, 8), 5 * number).save(pictures / f"{number:02d}.png")
    data = (
        "data=image_folder",
        f"data.root={pictures}",
        "data.image_size=8",
        "data.channels=1",
        "metrics=none",
    )
    cache = f"data.cache={tmp_path}/index"
    assert train(tmp_path, *data, cache, "trainer.max_steps=3").status == 0
    Image.new("L", (8, 8), 77).save(pictures / "03.png")
    refused = resume(tmp_path, "trainer.max_steps=4")
    assert refused.status == 2, refused.output
    assert "training images: fingerprint" in refused.output.splitlines()[-1]


def test_another_batch_size_neither_repeats_nor_misses_an_image(tmp_path):
    assert train(tmp_path, "trainer.max_steps=3").status == 0
    done = run(tmp_path, "train", "ckpt=last", "batch_size=32", "trainer.max_steps=5")
    assert done.status == 0, done.output
    assert "order-exact from step 3 (batch_size" in done.output
    assert training_state(run_folder(tmp_path), 5)["/data/samples"] == 3 * 16 + 2 * 32
