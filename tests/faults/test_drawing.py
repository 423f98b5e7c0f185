"""A killed sampling run, started again, gives the same bytes as an uninterrupted one."""

import signal

import pytest
from PIL import Image

from tests.faults.processes import Fault, run, run_folder, train

HALF_WAY = Fault("src.generation.pictures:Image.Image.save", 6)  # in the second batch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder, "trainer.max_steps=4").status == 0
    return run_folder(folder)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def test_resumed_sampling_gives_the_same_bytes(tmp_path, trained):
    draw = (
        "sample",
        f"run={trained}",
        "n=10",
        "batch_size=4",
        "sampler=ddpm",
        "sampler.steps=4",
        "device=cpu",
    )
    assert run(tmp_path, *draw, f"out={tmp_path}/whole").status == 0
    whole = bytes_of(tmp_path / "whole")
    killed = run(tmp_path, *draw, f"out={tmp_path}/parts", faults=[HALF_WAY])
    assert killed.status == 128 + signal.SIGKILL, killed.output
    parts = tmp_path / "parts" / "images"
    first, last = parts / "000000.png", parts / "000004.png"
    times = {path: path.stat().st_mtime_ns for path in (first, last)}
    first_batch_done = [parts / f"{i:06d}.png" for i in range(4)]
    assert all(path.exists() for path in first_batch_done)
    assert not (parts / "000009.png").exists()
    assert run(tmp_path, *draw, f"out={tmp_path}/parts").status == 0
    assert {
        name: content for name, content in bytes_of(tmp_path / "parts").items() if name[0] != "."
    } == whole
    assert first.stat().st_mtime_ns == times[first], "the finished batch was sampled again"
    assert last.stat().st_mtime_ns != times[last]


def drawing(trained, out):
    """A sampling command with two batches."""
    numbers = ("n=8", "batch_size=4", "sampler.steps=4", "device=cpu")
    return ("sample", f"run={trained}", *numbers, f"out={out}")


def test_damaged_image_is_sampled_again(tmp_path, trained):
    draw = drawing(trained, tmp_path / "out")
    assert run(tmp_path, *draw).status == 0
    whole = bytes_of(tmp_path / "out")
    broken = tmp_path / "out" / "images" / "000001.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    assert run(tmp_path, *draw).status == 0
    assert bytes_of(tmp_path / "out") == whole


def test_images_of_another_recipe_are_replaced(tmp_path, trained):
    draw = drawing(trained, tmp_path / "out")
    assert run(tmp_path, *draw).status == 0
    before = bytes_of(tmp_path / "out")
    killed = run(tmp_path, *draw, "seed=1", faults=[Fault("src.generation.recipe:Recipe.start", 1)])
    assert killed.status == 128 + signal.SIGKILL
    assert run(tmp_path, *draw, "seed=1").status == 0
    after = bytes_of(tmp_path / "out")
    assert all(after[name] != before[name] for name in before)
    Image.open(tmp_path / "out" / "grid.png").verify()


def test_images_of_an_older_recipe_are_replaced(tmp_path, trained):
    """A shorter sampling run with another seed in between also removes the images of the first run."""
    draw = drawing(trained, tmp_path / "out")
    assert run(tmp_path, *draw, "n=12").status == 0
    first = bytes_of(tmp_path / "out")
    assert run(tmp_path, *draw, "n=4", "seed=1").status == 0
    assert len(bytes_of(tmp_path / "out")) == 4
    assert run(tmp_path, *draw, "n=12", "seed=1").status == 0
    last = bytes_of(tmp_path / "out")
    assert [name for name in first if last[name] == first[name]] == []
