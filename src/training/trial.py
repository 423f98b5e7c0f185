"""A training in a search of hyperparameters: it reports its scores, and ends early if they are bad.

The training's trial is named by trial.json in the run folder, which the search writes. So every launcher can run the
training, and it reports again after a restart.
"""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.errors import UserError
from src.runs.files import Damaged, read_json
from src.runs.output import tolerated
from src.training.callbacks import TrackFidelity
from src.training.study import STUDY, TRIAL_FILE, Member, median_pruner, storage_of

log = logging.getLogger(__name__)


def report_of(folder: Path) -> "ReportTrial | None":
    """The callback of a training in this folder; None if it reports to no search.

    Raises:
        UserError: trial.json is damaged.
    """
    try:
        return ReportTrial(folder.parent, **read_json(folder / TRIAL_FILE, Member))
    except FileNotFoundError:
        return None
    except Damaged as error:
        raise UserError(f"{error}; remove it to train without the search") from None


class ReportTrial(Callback):
    """Reports every score to the study, and stops the training if the study prunes the trial.

    The stopped training ends as after its last step: it saves, and its scores are those of that step. Failures of the
    study do not end a training (`tolerated`).

    Args:
        folder: the sweep's folder.
        trial: see `Member`.
        objective: see `Member`.
        prune_after: see `Member`.
    """

    def __init__(self, folder: Path, trial: int, objective: str, prune_after: int):
        self.folder, self.trial, self.objective, self.prune_after = folder, trial, objective, prune_after
        self._step = 0
        self._seen: Any = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:  # a micro-batch
            return
        self._step = step
        value = self._value(trainer)
        if value is None or step == trainer.max_steps:
            return
        pruned = False
        if trainer.is_global_zero:
            with tolerated("report to the search"):
                pruned = self._is_pruned(step, value)
        if trainer.strategy.broadcast(pruned):
            log.info("pruned      at step %d: %s %.4g is worse than the median", step, self.objective, value)
            trainer.should_stop = True

    def _value(self, trainer: Trainer) -> float | None:
        """The objective, if it is new."""
        tracker = next((c for c in trainer.callbacks if isinstance(c, TrackFidelity)), None)
        latest = tracker.latest if tracker else None
        if latest is not None and latest is not self._seen:
            name = tracker.scores.monitored.name if self.objective == "score" else self.objective
            if name in latest.scores:
                self._seen = latest
                return latest.scores[name]
        losses = trainer.callback_metrics
        if self.objective in losses and losses[self.objective] is not self._seen:
            self._seen = losses[self.objective]
            return float(self._seen)
        return None

    def _is_pruned(self, step: int, value: float) -> bool:
        import optuna

        storage = storage_of(self.folder)
        study = optuna.load_study(
            study_name=STUDY,
            storage=storage,
            sampler=optuna.samplers.RandomSampler(),
            pruner=median_pruner(self.prune_after),
        )
        identity = storage.get_trial_id_from_study_id_trial_number(study._study_id, self.trial)
        if storage.get_trial(identity).state.is_finished():
            return False
        storage.set_trial_intermediate_value(identity, step, value)
        pruned = study.pruner.prune(study, storage.get_trial(identity))
        if pruned:
            storage.set_trial_user_attr(identity, "pruned_at", step)
        return pruned
