import inspect
import json
import logging
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf
from torch import nn

from src.data.codec import Pixels
from src.errors import UserError
from src.evaluation.record import Record
from src.evaluation.scores import ScoreSet
from src.generation.recipe import Generated
from src.metrics.fidelity import KernelDistance
from src.runs.output import failures, forget_failures
from src.training.callbacks import TrackFidelity
from tests.conftest import ROOT
from tests.metrics.pixels import REAL, Source, score_of


class Module(LightningModule):
    """A module with one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @contextmanager
    def averaged(self):
        yield self


class Shifted:
    """A recipe that returns the reference images plus `errors[i]` grey levels in scoring i, or raises `errors[i]`."""

    steps = 3
    codec = Pixels((1, 2, 2))

    def __init__(self, *errors: int | Exception):
        self.errors = list(errors)
        self.batches: list[int] = []

    def images(self, denoiser, indices, batch_size):
        error = self.errors.pop(0)
        if isinstance(error, Exception):
            raise error
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            self.batches.append(len(chosen))
            yield Generated((REAL[list(chosen)].int() + error).clamp(0, 255).byte(), evaluations=5)


class CheckpointIO(TorchCheckpointIO):
    failures = 0


@pytest.fixture
def fit(tmp_path):
    """Trains a few steps with a `TrackFidelity` and returns it."""

    def run(*errors, max_steps=4, scores=None, source=None, resume=None, **settings):
        forget_failures()
        settings = {"every": 1, "n": 50, "device_batch": 20, **settings}
        callback = TrackFidelity(
            scores=scores or ScoreSet([score_of(), score_of(KernelDistance, subset_size=20)]),
            recipe=Shifted(*errors),
            source=source or Source(train=REAL),
            best=tmp_path / "best.ckpt",
            record=lambda step, evaluations: {"training_steps": step, "network_evaluations": evaluations},
            **settings,
        )
        if resume is not None:
            callback.load_state_dict(resume)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            max_epochs=-1,
            callbacks=[callback],
            plugins=[CheckpointIO()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(100)))
        assert trainer.global_step == max_steps
        return callback

    return run


def best_step(tmp_path) -> int:
    return torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"]


def test_the_first_of_several_scores_decides_which_checkpoint_is_the_best(fit, tmp_path):
    callback = fit(30, 9, 2, 5)
    assert best_step(tmp_path) == 3
    record = Record.read(tmp_path / "best.json")
    assert list(record.scores) == ["fd_pixels", "kd_pixels", "kd_pixels_std"]
    assert record.protocol["recipe"] == {"training_steps": 3, "network_evaluations": 5}
    assert callback.best_value == record.scores["fd_pixels"]
    assert list(record.protocol["settings"]) == ["fd_pixels", "kd_pixels"]
    assert callback.latest.protocol["recipe"]["training_steps"] == 4


def test_batch_size_is_that_of_the_device_unless_given(fit):
    assert fit(1, max_steps=1).recipe.batches == [20, 20, 10]
    assert fit(1, max_steps=1, batch_size=40).recipe.batches == [40, 10]


def test_images_are_added_with_their_numbers(fit, monkeypatch):
    seen, plain = [], ScoreSet.update

    def update(self, images, labels=None, numbers=None):
        seen.append(list(numbers))
        plain(self, images, labels, numbers)

    monkeypatch.setattr(ScoreSet, "update", update)
    fit(1, max_steps=1)
    assert seen == [[*range(20)], [*range(20, 40)], [*range(40, 50)]]


@pytest.mark.parametrize(
    ("every", "at_end", "steps"), [(3, True, [3, 4]), (3, False, [3]), (2, False, [2, 4]), (9, False, [])]
)
def test_the_score_after_the_last_step_can_be_left_out(fit, every, at_end, steps):
    callback = fit(*range(len(steps)), every=every, at_end=at_end)
    assert callback.recipe.errors == [], "wrong number of scorings"
    assert (callback.latest is None) == (not steps)


def test_too_few_images_are_reported_before_the_first_step(fit):
    with pytest.raises(
        UserError, match=r"20 images \(subset_size=20\).* has 19; .*track_fidelity\.n=19"
    ) as raised:
        fit(n=19)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"fd_pixels .* the train split of noise has 1; .*metrics=none"):
        fit(source=Source(train=REAL[:1]))


def test_a_line_announces_each_score(fit, caplog):
    with caplog.at_level(logging.INFO):
        fit(1, max_steps=1)
    assert "score       fd_pixels, kd_pixels of 50 images, 3 sampler steps each" in caplog.text


def test_a_score_that_is_not_finite_is_reported_and_training_continues(fit, tmp_path, caplog):
    scores = ScoreSet([score_of()])
    original = scores.monitored.compare
    values = iter([None, float("nan"), None])

    def compare(*arguments):
        value = next(values)
        return original(*arguments) if value is None else {"fd_pixels": value}

    scores.monitored.compare = compare
    callback = fit(9, 1, 5, max_steps=3, scores=scores)
    assert "score failed: fd_pixels is nan over 50 images; training continues" in caplog.text
    assert best_step(tmp_path) == 3
    assert callback.latest.protocol["recipe"]["training_steps"] == 3


def test_lack_of_memory_is_reported_and_training_continues(fit, tmp_path, caplog):
    full = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
    )
    fit(9, full, 5, max_steps=3)
    assert "score failed: out of memory with 20 images per batch; lower" in caplog.text
    assert best_step(tmp_path) == 3


def test_failures_are_reported_once_and_counted(fit, tmp_path, caplog):
    forget_failures()  # those of other tests in this process
    fit(9, RuntimeError("one"), UserError("two"), 5, max_steps=4)
    assert caplog.text.count("score failed: one; training continues") == 1
    assert "two" not in caplog.text
    assert failures()["score"] == 2
    assert best_step(tmp_path) == 4


def test_a_cache_that_cannot_be_written_is_reported_once_and_training_continues(fit, tmp_path, caplog):
    (tmp_path / "file").touch()
    fit(9, 1, max_steps=2, cache=tmp_path / "file" / "cache")
    assert caplog.text.count("cannot be written") == 1
    assert json.loads((tmp_path / "best.json").read_text())["scores"]["fd_pixels"] > 0


def test_the_best_value_so_far_is_resumed_for_the_same_score_only(fit, tmp_path):
    state = fit(5, max_steps=1).state_dict()
    assert state == {"best_value": pytest.approx(6 * 5**2, rel=0.1), "score": "fd_pixels"}
    (tmp_path / "best.ckpt").write_bytes(b"of before")
    assert fit(9, max_steps=1, resume=state).best_value == state["best_value"]
    assert fit(9, max_steps=1, resume={"best_value": state["best_value"]}).best_value == state["best_value"]
    assert (tmp_path / "best.ckpt").read_bytes() == b"of before"
    assert fit(9, max_steps=1, resume={**state, "score": "kd_pixels"}).best_value > state["best_value"]
    assert best_step(tmp_path) == 1
    # without best.ckpt there is no best value
    (tmp_path / "best.ckpt").unlink()
    assert fit(9, max_steps=1, resume=state).best_value > state["best_value"]


@pytest.mark.parametrize("settings", [{"n": 1}, {"batch_size": 0}, {"every": 0}])
def test_invalid_arguments_are_refused(fit, settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} must be at least 1|^n must be at least 2"):
        fit(**settings)


def test_values_of_the_yaml_equal_the_defaults_of_the_constructor():
    numbers = dict(OmegaConf.load(ROOT / "conf/callbacks/track_fidelity.yaml").track_fidelity)
    assert numbers.pop("_target_").endswith("TrackFidelity")
    parameters = inspect.signature(TrackFidelity).parameters
    assert numbers == {name: parameters[name].default for name in ("every", "n", "batch_size", "at_end")}
