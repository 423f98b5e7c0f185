"""A table of images with labels and captions is trained on, resumed, sampled and scored where it has moved."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import QUICK

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
SIZE = 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sixty grey pictures in three classes, of which one has no caption."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    rows = []
    for i in range(60):
        file = io.BytesIO()
        Image.fromarray(np.full((SIZE, SIZE), 80 * (i % 3) + i, np.uint8)).save(file, "PNG")
        rows.append({"image": file.getvalue(), "label": "abc"[i % 3], "caption": f"shade {i}" if i else None})
    (tmp_path / "shades").mkdir()
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    parquet.write_table(table.data.table, tmp_path / "shades" / "train.parquet")
    return tmp_path / "shades"


def test_the_whole_way(command, only_run, folder, tmp_path, capsys):
    data = [
        *("data=huggingface", "data.path=shades", "data.num_classes=3", "data.caption_column=caption"),
        *(f"data.image_size={SIZE}", "data.channels=1", "data.holdout=0.2", f"data.cache={tmp_path}/cache"),
    ]
    options = [*QUICK, "metrics=none", "conditioning=class", "trainer.max_steps=2"]
    assert command("train", *data, *options, "runs=refused") == 2
    assert "1 of 60 images in data.path=shades" in capsys.readouterr().err.split("\n")[-2]

    assert command("train", *data, *options, "data.on_error=skip") == 0
    run = only_run()
    assert "train row 0 (no caption)" in (run / "train.log").read_text()
    assert json.loads((run / "environment.json").read_text())["classes"] == ["a", "b", "c"]
    assert command("train", f"ckpt={run}", "trainer.max_steps=3") == 0

    folder.rename(tmp_path / "moved")
    capsys.readouterr()
    task = ["task=img2img", "n=2", "device=cpu", "sampler.steps=2", f"out={tmp_path}/out"]
    assert command("sample", f"run={run}", "data.path=moved", *task) == 0
    assert "differ" not in capsys.readouterr().err
    assert list((tmp_path / "out").rglob("*.png"))
