"""Checked reads: JSON and tensors that are damaged, huge, of another kind, or no files."""

import json
import os
import pickle
import zipfile

import pytest
import torch

from src.errors import UserError
from src.runs.files import Damaged, Sidecar, damage, read_json, sidecar_path, write_json
from src.runs.folder import check_contained
from src.runs.tensors import load_tensors

RECORD = {"size": 1, "sha256": "x", "step": 2, "samples": None, "world_size": 1, "data": None}


def test_json_survives_a_round_trip(tmp_path):
    write_json(tmp_path / "a.json", RECORD)
    assert read_json(tmp_path / "a.json", Sidecar) == Sidecar(**RECORD)
    assert read_json(tmp_path / "a.json", dict[str, object]) == RECORD


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b" " * (17 << 20),
        b'{"size": "many", "sha256": "x", "step": 1}',
        b'{"size": 1, "sha256": "x"}',
        b'{"size": -1, "sha256": "x", "step": 1}',
        b'{"size": 1, "sha256": "x", "step": 9223372036854775808}',
        b'{"size": 1, "sha256": "x", "step": NaN}',
        json.dumps({**RECORD, "step": 1, "checksum": "0" * 16}).encode(),
    ],
)
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"a\.json is damaged") as error:
        read_json(path, Sidecar)
    assert "\n" not in str(error.value)


def test_an_altered_number_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, RECORD)
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(Damaged, match="has changed"):
        read_json(path, Sidecar)


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(Damaged, match="not a regular file"):
        read_json(tmp_path / "a.json", Sidecar)


def test_a_temporary_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(tmp_path / "outside")
    write_json(tmp_path / "a.json", RECORD)
    assert (tmp_path / "outside").read_text() == "precious"


def repeated(levels):
    node = [0]
    for _ in range(levels):
        node = [node, node]
    return node


def nested(depth):
    node = 0
    for _ in range(depth):
        node = [node]
    return node


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (repeated(40), "too many"),
        (nested(100), "deeply nested"),
        (torch.zeros(1).expand(10**6, 10**6), "a tensor of"),
        (torch.eye(3).to_sparse(), "a tensor of"),
    ],
)
def test_absurd_content_is_refused(tmp_path, content, word):
    torch.save({"x": content}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=word):
        load_tensors(tmp_path / "a.ckpt", mapped=True)
    assert damage(tmp_path / "a.ckpt")


def test_a_compressed_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", pickle.dumps(bytes(10**6)))
    with pytest.raises(ValueError, match="compressed"):
        load_tensors(tmp_path / "a.ckpt", mapped=True)


@pytest.mark.parametrize("mapped", [True, False])
def test_tensors_are_loaded(tmp_path, mapped):
    torch.save({"x": torch.arange(3), "y": [1, "a"]}, tmp_path / "a.ckpt")
    content = load_tensors(tmp_path / "a.ckpt", mapped)
    assert content["x"].tolist() == [0, 1, 2]
    assert content["y"] == [1, "a"]


def test_links_inside_a_run_folder_are_followed(tmp_path):
    run = tmp_path / "run"
    (run / "wandb" / "run-1").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "link").symlink_to(run)
    (run / "wandb" / "debug.log").symlink_to("run-1/not-yet.log")
    (run / "notes").symlink_to(tmp_path)  # none of ours
    check_contained(run)
    check_contained(tmp_path / "link")


@pytest.mark.parametrize("target", ["/etc/passwd", "..", "../new", "/nowhere"])
def test_other_links_are_refused(tmp_path, target):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(target)
    with pytest.raises(UserError, match="samples"):
        check_contained(tmp_path / "run")


def test_a_link_to_a_folder_with_a_pipe_is_refused(tmp_path):
    (tmp_path / "run" / "mine").mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / "mine" / "pipe")
    check_contained(tmp_path / "run")
    (tmp_path / "run" / "samples").symlink_to("mine")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        check_contained(tmp_path / "run")


def test_the_record_of_a_checkpoint_lies_beside_it(tmp_path):
    assert sidecar_path(tmp_path / "a.ckpt") == tmp_path / "a.ckpt.json"


def test_the_link_of_wandb_to_its_service_is_no_link_out(tmp_path):
    logs = tmp_path / "run" / "wandb" / "offline-run-1" / "logs"
    logs.mkdir(parents=True)
    (tmp_path / "elsewhere").touch()
    (logs / "debug-core.log").symlink_to(tmp_path / "elsewhere")
    check_contained(tmp_path / "run")
