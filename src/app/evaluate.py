"""The job of `src.evaluate`: scores of a trained run, or of given images."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from src.app.build import build
from src.app.launch import launch
from src.app.load import load_with, pick_device
from src.app.options import CONF, NUMERICS, Option
from src.app.parts import image_scores, is_likelihood, is_memorisation, metric_nodes, scores_of, source_named
from src.app.shared import shared
from src.app.sweep.jobs import option_of
from src.data.codec import Pixels, TruncatedPixels
from src.data.given import in_words, open_given
from src.data.source import SPLITS, ImageSource
from src.errors import TooFewImages, UserError
from src.evaluation.likelihood import Likelihood, score_likelihood
from src.evaluation.memorisation import Memorisation, score_memorisation
from src.evaluation.record import Record
from src.evaluation.reference import GivenSource, share_of
from src.evaluation.scores import ScoreSet
from src.generation.loaded import LoadedRun
from src.generation.recipe import warn_of_missing_signal
from src.runs.files import digest_of
from src.runs.folder import SCORES_FILE, recipe_folder
from src.runs.processes import gathered, rank, world_size

log = logging.getLogger(__name__)

BY_ITSELF = "metrics: memorisation is computed by itself, with devices=1"
OF_A_RUN = (
    "sampler",
    "spacing",
    "guidance",
    "clipping",
    "variance",
    "preset",
    "wrappers",
    "weights",
    "checkpoint",
)
OF_A_RUN += ("seed", "labels", "prompts", "bytes", "data", "conditioning", "precision", "compile", "noise")
IMAGES = 10_000
"""Generated images that are scored by default."""
AS_GIVEN = "bytes as given"
"""The conversion to bytes of given images, in records: it is not known."""


def evaluate(config: DictConfig) -> dict[str, float]:
    """Scores generated or given images, or the likelihood of given ones; writes the scores with their protocol.

    A job of a sweep also writes them into its own folder.

    Args:
        config: conf/evaluate.yaml, composed.

    Returns:
        The scores by name.
    """
    own = HydraConfig.get().run.dir
    job = None if own == "." else Path(own)
    if config.images is not None:
        if config.run is not None:
            raise UserError(f"images={config.images}: give run=... or images=..., not both")
        chosen = {option_of(override).partition(".")[0] for override in HydraConfig.get().overrides.task}
        if without_effect := sorted(chosen & set(OF_A_RUN)):
            raise UserError(f"{without_effect[0]}: has no effect on given images; leave it out")
        return launch(partial(evaluate_given, job=job), config)
    if config.run is None:
        raise UserError("run is missing: give run=..., or images=... with reference=...")
    likelihoods = [option for option, node in metric_nodes(config).items() if is_likelihood(node)]
    if likelihoods and config.devices > 1:
        raise UserError(f"{likelihoods[0]}: a likelihood is computed by itself, with devices=1")
    if config.devices > 1 and any(map(is_memorisation, metric_nodes(config).values())):
        raise UserError(BY_ITSELF)
    return launch(partial(evaluate_on_this_process, job=job), config)


def evaluate_on_this_process(config: DictConfig, job: Path | None) -> dict[str, float]:
    """The share of this process; see `evaluate`, and `publish` for `job`."""
    loaded, merged = load_with(config)
    nodes = metric_nodes(merged)
    likelihoods = [option for option, node in nodes.items() if is_likelihood(node)]
    folder = loaded.found.folder / "scores"
    if likelihoods:
        if len(nodes) > 1 or config.devices > 1:
            raise UserError(f"{likelihoods[0]}: a likelihood is computed by itself, with devices=1")
        if not loaded.recipe.codec.bounded:
            raise UserError(f"{likelihoods[0]}: bits per dimension are of pixels, and this run has latents")
        without_effect(config, NUMERICS)
        likelihood = build(nodes[likelihoods[0]], Likelihood, likelihoods[0])
        record = score_likelihood(loaded, likelihood, config.n or IMAGES, config.batch_size, config.seed)
        return publish(record, folder / f"nll_seed-{config.seed}_{digest_of(record.protocol)}", job)
    if any(map(is_memorisation, nodes.values())):
        return report_memorisation(loaded, nodes, config, folder, job)
    record = score_images(with_bytes(loaded, config.bytes), merged, config)
    if rank() == 0:
        return publish(record, recipe_folder(folder, record.protocol), job)
    return record.scores


def without_effect(config: DictConfig, others: Sequence[Option] = ()) -> None:
    """Refuses options that a likelihood and the comparison with training images do not read, and these others."""
    plain = {"bytes": "round", "reference": None, "per_class": False}
    plain |= {option.name: option.default for option in others}
    for option, value in plain.items():
        if config[option] != value:
            raise UserError(f"{option}={config[option]}: has no effect on this metric; leave it out")


def report_memorisation(
    loaded: LoadedRun, nodes: dict[str, DictConfig], config: DictConfig, folder: Path, job: Path | None
) -> dict[str, float]:
    """Compares generated with training images; writes the record and a picture of the nearest neighbours."""
    if len(nodes) > 1 or config.devices > 1:
        raise UserError(BY_ITSELF)
    without_effect(config)
    ((option, node),) = nodes.items()
    memorisation = build(node, Memorisation, option)
    record, picture = score_memorisation(
        loaded, memorisation, config.n or IMAGES, config.batch_size, config.seed
    )
    folder = folder / f"memorisation_seed-{config.seed}_{digest_of(record.protocol)}"
    scores = publish(record, folder, job)
    picture.save(folder / "nearest.png")
    log.info("%s  rows: generated, nearest training image, nearest held-out image", folder / "nearest.png")
    return scores


def with_bytes(loaded: LoadedRun, how: str) -> LoadedRun:
    """The run with another conversion of generated values to bytes: "round", its own, or "truncate".

    Raises:
        UserError: its codec does not only rescale pixels.
    """
    codec = loaded.recipe.codec
    if how == "round":
        return loaded
    if type(codec) is not Pixels:
        raise UserError(f"bytes={how}: this run has codec={type(codec).__name__}; leave bytes out")
    return replace(loaded, recipe=replace(loaded.recipe, codec=TruncatedPixels(codec.image_shape)))


def prepared_scores(loaded: LoadedRun, merged: DictConfig, config: DictConfig) -> ScoreSet:
    """The scores of a run's images with their references, on the run's device, after all checks.

    Raises:
        UserError: there are none, or there are too few images.
    """
    n = config.n or IMAGES
    recipe = loaded.recipe
    groups = ("metrics", "data", "codec", "conditioning")
    depends = OmegaConf.to_yaml(OmegaConf.masked_copy(merged, groups))
    key = (depends, config.per_class, config.cache, config.reference, loaded.device)
    scores = shared("scores", key, lambda: scores_of(merged, recipe, config.per_class))
    if scores is None:
        raise UserError("metrics: this run has none; choose one, e.g. metrics=fid")
    source = reference_of(config.reference, scores, loaded.source, recipe.codec.image_shape)
    try:
        labels = recipe.labels(range(n)) if config.per_class else None
        scores.check_counts(n, source, labels)
    except TooFewImages as error:
        raise UserError(
            f"{error}; change n={n} or metrics{', or per_class' if config.per_class else ''}"
        ) from None
    scores.to(loaded.device)
    if scores.needs_reference:
        scores.set_references(source, rank(), world_size(), config.cache)
    scores.reset()
    return scores


def score_images(loaded: LoadedRun, merged: DictConfig, config: DictConfig) -> Record:
    """The scores of generated images, all from one sampling pass; every process makes its batches."""
    if rank() == 0:
        warn_of_missing_signal(loaded.denoiser, loaded.recipe)
    n, recipe = config.n or IMAGES, loaded.recipe
    scores = prepared_scores(loaded, merged, config)
    batches = [range(first, min(first + config.batch_size, n)) for first in range(0, n, config.batch_size)]
    description = f"{scores.names}: generating"
    evaluations = 0
    for numbers in track(
        batches[rank() :: world_size()], description=description, transient=True, disable=rank() > 0
    ):
        (made,) = recipe.images(loaded.denoiser, numbers, config.batch_size)
        scores.update(made.images, made.labels, numbers)
        evaluations = max(evaluations, made.evaluations)
    evaluations = max(gathered(evaluations))
    values = scores.compute(n)
    return scores.record(values, loaded.record(evaluations), recipe.codec.describe())


def reference_of(
    reference: str | None, scores: ScoreSet, own: ImageSource | None, image_shape: tuple[int, int, int]
) -> ImageSource | GivenSource:
    """What the option `reference` names; its split becomes that of the scores.

    Args:
        reference: the option.
        scores: the scores.
        own: the run's data; None for given images.
        image_shape: (C, H, W) of the scored images.

    Raises:
        UserError: there is no such reference, its images have another shape, or they lack classes that scores need.
    """
    if reference is None and own is None:
        needing = [score.name for score in scores.scores if score.needs_reference]
        if needing:
            raise UserError(
                f"reference is missing: {', '.join(needing)} compares images with others; give reference=<data set,"
                " folder, .zip or .npz>"
            )
        return GivenSource(None)
    name, _, split = (reference or "").replace(":", "/").partition("/")
    if reference is None or reference in SPLITS:
        if own is None:
            raise UserError(
                f"reference={reference}: a split needs a data set, e.g. reference=digits/{reference}"
            )
        source, split = own, reference
    elif (CONF / "data" / f"{name}.yaml").is_file() and split in ("", *SPLITS):
        source = source_named(name)
        split = split or None
    elif (CONF / "data" / f"{name}.yaml").is_file() and not Path(reference).expanduser().exists():
        raise UserError(f"reference={reference}: {name} has no such split; give {name}/{' or '.join(SPLITS)}")
    else:
        source, split = GivenSource(open_given(reference, "reference")), "all"
        found = source.images and source.images.shape
        if found and tuple(found) != tuple(image_shape):
            raise UserError(
                f"reference={reference}: its images are {in_words(found)}, and the scored ones {in_words(image_shape)};"
                " resize one of them"
            )
    if isinstance(source, ImageSource):
        if tuple(source.image_shape) != tuple(image_shape):
            raise UserError(
                f"reference={reference}: {source.name} has images of {in_words(source.image_shape)}, and the scored"
                f" ones are {in_words(image_shape)}; resize one of them"
            )
        source.check()
        source.prepare()
    if scores.of_classes and not source.num_classes and any(score.needs_reference for score in scores.scores):
        raise UserError(
            f"per_class=true: reference={reference} has no classes; leave per_class out, or choose a reference with"
            " classes"
        )
    if split is not None:
        scores.use_split(split)
    return source


def evaluate_given(config: DictConfig, job: Path | None) -> dict[str, float]:
    """The share of this process in the scores of given images; see `evaluate`, and `publish` for `job`."""
    given = open_given(config.images, "images")
    images = given.images
    if images is None:
        raise UserError(f"images={config.images}: has only mu and sigma; give images")
    n = config.n or len(images)
    if n > len(images):
        raise UserError(f"n={n}: {config.images} has {len(images)} images; choose fewer, or leave n out")
    if config.per_class:
        raise UserError("per_class=true: given images have no classes; leave per_class out")
    scores = image_scores(metrics_of_given(config), images.shape)
    if scores is None:
        raise UserError("metrics: choose the scores, e.g. metrics=[fid,kid]")
    source = reference_of(config.reference, scores, None, images.shape)
    try:
        scores.check_counts(n, source)
    except TooFewImages as error:
        raise UserError(f"{error}; give more images, or choose other metrics") from None
    device = pick_device(config.device)
    scores.to(device)
    scores.set_references(source, rank(), world_size(), config.cache)
    batches = share_of(images, config.batch_size, rank(), world_size(), n)
    total = -(-len(range(rank(), n, world_size())) // config.batch_size)
    for batch, _, numbers in track(
        batches, description=f"{scores.names}: features", total=total, transient=True, disable=rank() > 0
    ):
        scores.update(batch.to(device), numbers=numbers)
    values = scores.compute(n)
    record = scores.record(values, {}, AS_GIVEN)
    protocol: dict[str, Any] = {name: part for name, part in record.protocol.items() if name != "recipe"}
    protocol["images"] = {
        "from": given.name,
        "number": len(images),
        "shape": list(images.shape),
        "files_left_out": images.others,
        "sha256": images.fingerprint(),
    }
    record = replace(record, protocol=protocol)
    if rank() == 0:
        folder = Path(config.runs) / "scores" / f"{Path(given.name).stem}_{digest_of(protocol)}"
        return publish(record, folder, job)
    return record.scores


def metrics_of_given(config: DictConfig) -> DictConfig:
    """The configuration with the metrics of given images: the chosen ones, or the default of a reference data set."""
    name = (config.reference or "").replace(":", "/").partition("/")[0]
    if metric_nodes(config) or not (CONF / "data" / f"{name}.yaml").is_file():
        return config
    chosen = OmegaConf.create({"defaults": [name]})
    while "defaults" in chosen:
        path = CONF / "metrics" / f"{chosen.defaults[0]}.yaml"
        if not path.is_file():
            return config
        chosen = OmegaConf.load(path)
    return OmegaConf.create({"metrics": chosen})


def publish(record: Record, folder: Path, job: Path | None) -> dict[str, float]:
    """Writes a record as <folder>/scores.json; prints the scores, and returns them with the network's evaluations.

    Args:
        record: the record.
        folder: its folder.
        job: the folder of the job of a sweep, in which the record is written too; or None.
    """
    path = folder / SCORES_FILE
    record.write(path)
    if job is not None:
        record.write(job / SCORES_FILE)
    width = max(map(len, ("evaluations", *record.scores))) + 4
    lines = [f"{name:<{width}}{record.printed(name)}" for name in record.scores]
    lines += [f"{'warning':<{width}}{line}" for line in record.warnings or ()]
    scores = dict(record.scores)
    if "recipe" in record.protocol:  # a likelihood has none
        evaluations = record.protocol["recipe"]["network_evaluations"]
        lines.append(f"{'evaluations':<{width}}{evaluations} of the network for an image")
        scores["evaluations"] = evaluations
    log.info("%s\n%s%s", "\n".join(lines), "protocol".ljust(width), path)
    return scores
