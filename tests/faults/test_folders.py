"""Run folders with odd names, full disks at the start, curves after a kill, stopped sweeps, weights not finite."""

import csv
import errno
import json
import os
import signal
from functools import partial

import pytest

from src.app.overrides import quoted
from tests.faults import hostile
from tests.faults.processes import Fault, Replacement, run, run_folder, train

# a backslash, quotes, brackets, a comma, and a byte that is not UTF-8
ODD = os.fsdecode(b"a\\b 'c' [d],e\xff")


@pytest.mark.parametrize("name", ["plain", "a\\b", "a\\", "\\'", "${x}", "\\${x}", ODD])
def test_a_quoted_path_is_read_as_it_is(tmp_path, name):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    value = OverridesParser.create().parse_override(f"ckpt={quoted(tmp_path / name)}").value()
    assert OmegaConf.create({"ckpt": value}).ckpt == str(tmp_path / name)


def test_a_run_in_an_oddly_named_folder_is_continued(tmp_path):
    place = tmp_path / ODD
    assert train(place, "trainer.max_steps=1", "metrics=none").status == 0
    done = run(place, "train", "ckpt=last", "trainer.max_steps=2")
    assert done.status == 0, done.output
    assert len(list(run_folder(place).glob("checkpoints/*.ckpt"))) == 2


def refuse(code, *_, **named):
    raise OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    ("place", "code"), [("src.app.train:write_config", errno.ENOSPC), ("src.app.train:locked", errno.EROFS)]
)
def test_a_full_or_read_only_disk_at_the_start_is_one_line(tmp_path, place, code):
    command = train(tmp_path, "metrics=none", faults=[Replacement(place, partial(refuse, code))])
    assert command.status == 2
    assert "Traceback" not in command.output
    assert f"error: {os.strerror(code)}; choose another disk" in command.output


def weights_that_are_not_finite(content, outside):
    content["callbacks"]["EMA"]["weights"]["conv_in.weight"].fill_(float("nan"))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    assert train(tmp_path, "trainer.max_steps=1", "metrics=none").status == 0
    hostile.content(weights_that_are_not_finite)(run_folder(tmp_path), tmp_path)
    for command in (["sample", f"run={run_folder(tmp_path)}"], ["train", "ckpt=last", "trainer.max_steps=2"]):
        done = run(tmp_path, *command)
        assert done.status == 2
        assert "conv_in.weight" in done.output
        assert "not finite" in done.output.splitlines()[-1]


def test_no_point_is_in_the_curves_twice(tmp_path):
    killed = train(
        tmp_path, "metrics=none", faults=[Fault("src.training.module:DiffusionModule.training_step", 9)]
    )
    assert killed.status == 137
    assert run(tmp_path, "train", "ckpt=last", "trainer.max_steps=10").status == 0
    steps = []
    for path in sorted(run_folder(tmp_path).glob("csv/version_*/metrics.csv")):
        with path.open(newline="") as file:
            steps += [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == [2, 4, 6, 8, 10]


def test_a_stopped_sweep_prints_its_table(tmp_path):
    stop = Fault("src.training.module:DiffusionModule.training_step", 5, signal.SIGTERM)
    stopped = train(tmp_path, "-m", "seed=0,1", "trainer.max_steps=3", "metrics=none", faults=[stop])
    assert stopped.status == 143, stopped.output
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    outcomes = json.loads((folder / "sweep.json").read_text())
    assert sorted(outcomes) == ["0_seed-0"], "names hold the swept options only"
    assert "error" not in outcomes["0_seed-0"]
    assert "not run to its end; the same command continues it" in stopped.output


@pytest.mark.parametrize("option", ["optimizer.lr=inf", "optimizer.eps=nan", "model.dropout=1.0"])
def test_numbers_that_make_no_sense_are_refused(tmp_path, option):
    done = train(tmp_path, option)
    assert done.status == 2
    assert option.partition("=")[0] in done.output.splitlines()[-1]
