"""The second run of a guidance, a weaker denoiser or a classifier, and the teacher of a distillation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from src.app.build import check_value, class_of, takes
from src.app.conditions import with_labels
from src.app.options import RUN_OPTIONS
from src.app.restore import Restored, config_of, load_weights, parts_of
from src.conditioning import Conditioning
from src.data.codec import Codec
from src.diffusion.autoencoder import Autoencoder
from src.diffusion.classifier import NoiseClassifier
from src.diffusion.denoiser import BaseDenoiser, Conditioned, Denoiser
from src.diffusion.guidance import AutoGuidance, ClassifierGuidance
from src.diffusion.schedule import Schedule
from src.errors import UserError
from src.runs.files import file_sha256
from src.runs.folder import find_run
from src.training.reading import read_checkpoint


@dataclass(frozen=True)
class Guide:
    """What a second run gives.

    Attributes:
        arguments: of the guidance's constructor.
        conditioning: of the sampled images.
    """

    arguments: dict[str, Any]
    conditioning: Conditioning | None


def needs_run(node: DictConfig | None) -> bool:
    """Whether a guidance has a second run."""
    found = class_of(node)
    return found is not None and issubclass(found, AutoGuidance | ClassifierGuidance)


def guide_of(whole: DictConfig, guided: Denoiser, codec: Codec, conditioning: Conditioning | None) -> Guide:
    """Loads the second run of a guidance.

    Args:
        whole: composed, with the guidance and its `RUN_OPTIONS`.
        guided: the denoiser that is guided.
        codec: its codec.
        conditioning: its conditioning.

    Raises:
        UserError: there is no such run, or it does not fit.
    """
    by_classifier = issubclass(class_of(whole.guidance), ClassifierGuidance)
    check = check_classifier if by_classifier else check_weak
    parts, network = second_run(whole.guidance, "guidance", guided, codec, conditioning, check)
    if by_classifier:
        arguments = {"classifier": network, "conditional": conditioning is not None}
        return Guide(arguments, conditioning or with_labels(parts.conditioning, whole, parts.source))
    return Guide({"weak": network}, conditioning)


def teacher_of(
    node: DictConfig, student: Denoiser, codec: Codec, conditioning: Conditioning | None
) -> BaseDenoiser | None:
    """The frozen denoiser of the run that a loss names; None if it names none.

    Args:
        node: of the loss.
        student: the denoiser that is trained.
        codec: its codec.
        conditioning: its conditioning.

    Raises:
        UserError: there is no such run, or it does not fit.
    """
    if not takes(node, "teacher") or (not OmegaConf.is_missing(node, "run") and node.get("run") is None):
        return None
    return second_run(node, "loss", student, codec, conditioning, check_teacher)[1]


def second_run(
    node: DictConfig,
    group: str,
    first: Denoiser,
    codec: Codec,
    conditioning: Conditioning | None,
    check: Callable[[Restored, Conditioning | None], None],
) -> tuple[Restored, BaseDenoiser]:
    """Loads the run that a node names by its `RUN_OPTIONS`: its parts, and its denoiser, frozen.

    Args:
        node: of the group.
        group: its name, for messages.
        first: the denoiser that the run guides or teaches.
        codec: its codec.
        conditioning: its conditioning.
        check: raises ValueError if the run does not fit.

    Raises:
        UserError: there is no such run, or it does not fit.
    """
    if OmegaConf.is_missing(node, "run"):
        raise UserError(f"{group}.run is missing: give {group}.run=<run folder or checkpoint>")
    run, checkpoint, weights = (node.get(name, option.default) for name, option in RUN_OPTIONS.items())
    for (name, option), value in zip(RUN_OPTIONS.items(), (run, checkpoint, weights), strict=True):
        check_value(option.annotation(), value, f"{group}.{name}")
    found = find_run(run, checkpoint, f"{group}.run")
    content = read_checkpoint(found.checkpoint)
    config = config_of(content, found)
    parts = parts_of(config)
    try:
        check_fit(parts, first, codec)
        check(parts, conditioning)
    except ValueError as error:
        raise UserError(f"{group}.run={run}: {error}") from None
    name, _ = load_weights(parts.denoiser, found, content, config, weights)
    network: BaseDenoiser = parts.denoiser
    if parts.conditioning is None and not isinstance(network, NoiseClassifier):
        network = Conditioned(network, None)
    digest = file_sha256(found.checkpoint)[:16]
    network.identity = f"run(checkpoint={digest}, training_steps={content['global_step']}, weights={name!r})"
    return parts, network


def check_fit(parts: Restored, guided: Denoiser, codec: Codec) -> None:
    """Raises ValueError if a second run sees other images, or other noise levels, than the guided one."""
    if isinstance(parts.denoiser, Autoencoder):
        raise ValueError("it is an autoencoder; choose a diffusion run")
    if parts.codec.shape != codec.shape:
        theirs, ours = (" x ".join(map(str, c.shape)) for c in (parts.codec, codec))
        raise ValueError(
            f"it is of images of {theirs}, and this run's are {ours}; choose a run on the same data"
        )
    if parts.codec.describe() != codec.describe():
        theirs, ours = (f"{type(c).__name__} ({c.describe()})" for c in (parts.codec, codec))
        raise ValueError(f"its codec is {theirs}, and this run's is {ours}; choose a run with the same codec")
    if not same_levels(parts.denoiser.schedule, guided.schedule):
        theirs, ours = (type(schedule).__name__ for schedule in (parts.denoiser.schedule, guided.schedule))
        other = theirs if theirs != ours else f"{theirs} with other options"
        raise ValueError(
            f"it was trained on the schedule {other}, and this run on {ours}; choose a run with the same schedule"
        )


def check_weak(parts: Restored, conditioning: Conditioning | None) -> None:
    """Raises ValueError if a run cannot be the weaker one of guidance=auto."""
    if isinstance(parts.denoiser, NoiseClassifier):
        raise ValueError("it is a classifier; choose guidance=classifier, or a diffusion run")
    if parts.conditioning is not None and conditioning is None:
        raise ValueError("it is conditional, and the guided run is not; choose a run with conditioning=none")
    check_classes(parts, conditioning)


def check_teacher(parts: Restored, conditioning: Conditioning | None) -> None:
    """Raises ValueError if a run cannot teach one with this conditioning."""
    if isinstance(parts.denoiser, NoiseClassifier):
        raise ValueError("it is a classifier; choose a diffusion run")
    if (parts.conditioning is None) != (conditioning is None):
        theirs, ours = (
            "unconditional" if each is None else f"conditioned on {read_by(each)}"
            for each in (parts.conditioning, conditioning)
        )
        raise ValueError(f"it is {theirs}, and this training is {ours}; choose the same conditioning")
    check_classes(parts, conditioning)


def check_classifier(parts: Restored, conditioning: Conditioning | None) -> None:
    """Raises ValueError if a run cannot be that of guidance=classifier."""
    if not isinstance(parts.denoiser, NoiseClassifier):
        raise ValueError(
            "it is no classifier; train one, e.g. with experiment=classifier_digits, or choose guidance=auto"
        )
    check_classes(parts, conditioning)


def check_classes(parts: Restored, conditioning: Conditioning | None) -> None:
    """Raises ValueError if both runs are conditional, but on different things; see `read_by`."""
    if parts.conditioning is None or conditioning is None:
        return
    theirs, ours = read_by(parts.conditioning), read_by(conditioning)
    if theirs != ours:
        raise ValueError(f"it is conditioned on {theirs}, and this run on {ours}")


def read_by(conditioning: Conditioning) -> str:
    """What a network reads: kinds, number of classes, factor of the low resolution, text encoder."""
    details = [
        f"{getattr(conditioning, name)} {words}"
        for name, words in (("num_classes", "classes"), ("factor", "times smaller"))
        if hasattr(conditioning, name)
    ]
    if hasattr(conditioning, "encoder"):
        details.append(conditioning.encoder.describe())
    kinds = ", ".join(sorted(conditioning.kinds))
    return f"{kinds} ({'; '.join(details)})" if details else kinds


def same_levels(a: Schedule, b: Schedule) -> bool:
    """Whether two schedules have the same levels, with the same labels, at the same times."""
    if (a.t_min, a.t_max) != (b.t_min, b.t_max):
        return False
    times = torch.linspace(a.t_min, a.t_max, 101, dtype=torch.float64)
    levels = [(level.alpha, level.sigma, level.label) for level in (a(times), b(times))]
    return all(torch.equal(x, y) for x, y in zip(*levels, strict=True))
