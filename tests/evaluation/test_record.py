import json

import pytest
import torch

from src.errors import UserError
from src.evaluation.record import Record
from src.evaluation.scores import ScoreSet
from src.metrics.fidelity import KernelDistance
from tests.metrics.pixels import FAKE, REAL, Source, score_of

RECIPE = {"training_steps": 500, "weights": "ema", "ema_decay": 0.999, "sampler": "DDIM(eta=0.0)", "seed": 7}
REFERENCE = {"data": "noise", "split": "train", "count": 50, "fingerprint": "abc-train"}
FEATURES = {"name": "pixels", "num_features": 6, "sha256": "pixels", "origin": "the pixels themselves"}
KD = {"kernel": "(x.y/d + 1)^3", "subsets": 3, "subset_size": 20, "seed": 2020}
KD["drawn_from"] = "the images in their order"


def protocol(*scores) -> dict:
    together = ScoreSet(scores)
    together.set_references(Source(train=REAL))
    together.update(FAKE)
    together.compute()
    return json.loads(json.dumps(together.protocol(RECIPE, "rounded to bytes")))


def test_protocol_of_one_score_is_complete():
    found = protocol(score_of(KernelDistance, subsets=3, subset_size=20))
    versions = found.pop("versions")
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(versions) == {"torch", "torchmetrics", "torch-fidelity"}
    assert found == {
        "num_images": 40,
        "reference": REFERENCE,
        "features": FEATURES,
        "settings": KD,
        "higher_is_better": {"kd_pixels": False},
        "recipe": RECIPE,
        "quantisation": "rounded to bytes",
    }


def test_the_protocol_of_several_scores_has_an_entry_for_each():
    found = protocol(score_of(), score_of(KernelDistance, subsets=3, subset_size=20))
    assert found["reference"] == {"fd_pixels": REFERENCE, "kd_pixels": REFERENCE}
    assert found["features"] == {"fd_pixels": FEATURES, "kd_pixels": FEATURES}
    assert found["settings"] == {"fd_pixels": {}, "kd_pixels": KD}
    assert found["recipe"] == RECIPE
    assert found["higher_is_better"] == {"fd_pixels": False, "kd_pixels": False}


@pytest.mark.parametrize(
    "record",
    [
        Record({"fd_digits": 0.5, "kd_digits": -1e-3}, {"num_images": 40, "recipe": RECIPE}),
        Record({"bits_per_dim": 3.1}, {"seed": 0}, {"bits_per_dim": [0.1, 3.0]}),
        Record({"fid": 3.1}, {}, intervals={"fid": [3.0, 3.2]}, warnings=["fid: rank 3 of 6"]),
        Record({}, {}),
    ],
)
def test_record_survives_a_round_trip(tmp_path, record):
    path = tmp_path / "folder" / "scores.json"
    record.write(path)
    assert Record.read(path) == record


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"fd_digits": 0.5, "val/loss": 0.1}', Record({"fd_digits": 0.5, "val/loss": 0.1}, {})),
        ('{"val/loss": NaN}', None),
        ('{"scores": {"fid": 3}, "protocol": {"num_images": 2}}', Record({"fid": 3}, {"num_images": 2})),
        (
            '{"scores": {"a": 1.0}, "protocol": {}, "curve": {"a": [1, 2.5]}}',
            Record({"a": 1.0}, {}, {"a": [1, 2.5]}),
        ),
    ],
)
def test_files_of_earlier_versions_are_read(tmp_path, content, expected):
    path = tmp_path / "scores.json"
    path.write_text(content)
    found = Record.read(path)
    if expected is None:
        assert found.scores["val/loss"] != found.scores["val/loss"]
    else:
        assert found == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"scores": {"fid": 3',
        b"\xff\xfe",
        b"[" * 100_000,
        b"[1, 2]",
        b'"text"',
        b'{"fid": "3"}',
        b'{"fid": true}',
        b'{"scores": [1], "protocol": {}}',
        b'{"scores": {"fid": null}, "protocol": {}}',
        b'{"scores": {"fid": 3}}',
        b'{"scores": {"fid": 3}, "protocol": []}',
        b'{"scores": {}, "protocol": {}, "curve": [1]}',
        b'{"scores": {}, "protocol": {}, "curve": {"a": 1}}',
        b'{"scores": {}, "protocol": {}, "curve": {"a": ["1"]}}',
        b'{"scores": {}, "protocol": {}, "other": 1}',
        b'{"scores": {}, "protocol": {}, "intervals": {"a": [1]}}',
        b'{"scores": {}, "protocol": {}, "warnings": "a"}',
    ],
)
def test_a_damaged_file_is_a_user_error_in_one_line(tmp_path, content):
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as raised:
        Record.read(path)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read"):
        Record.read(tmp_path / "none.json")
