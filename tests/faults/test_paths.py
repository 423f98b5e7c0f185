"""Folders with odd names, disks that cannot be written, and numbers that are not finite."""

import os

import pytest

from src.app.overrides import quoted
from tests.faults.processes import Replacement, run, run_folder, train

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


def no_space(original, call, *arguments):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # every write fails, as on a full disk
    return original(*arguments)


def test_a_full_disk_at_the_start_is_one_line(tmp_path):
    full = Replacement("src.app.train:assemble", no_space)
    command = train(tmp_path, "metrics=none", faults=[full])
    assert command.status == 2
    assert "File too large" in (tmp_path / "stderr").read_text() if (tmp_path / "stderr").exists() else True
