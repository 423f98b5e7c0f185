"""The job of `src.evaluate`: scores of a trained run."""

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from src.app.build import build
from src.app.launch import launch
from src.app.load import load_with
from src.app.parts import is_likelihood, is_memorisation, metric_nodes, scores_of
from src.app.shared import shared
from src.errors import UserError
from src.evaluation.likelihood import Likelihood, score_likelihood
from src.evaluation.memorisation import Memorisation, score_memorisation
from src.evaluation.record import Record
from src.generation.loaded import LoadedRun
from src.generation.recipe import warn_of_missing_signal
from src.runs.files import digest_of
from src.runs.folder import SCORES_FILE, recipe_folder
from src.runs.processes import gathered, rank, world_size

log = logging.getLogger(__name__)

BY_ITSELF = "metrics: memorisation is computed by itself, with devices=1"


def evaluate(config: DictConfig) -> dict[str, float]:
    """Scores generated images, or the likelihood of given ones; writes the scores with their protocol.

    Args:
        config: conf/evaluate.yaml, composed.

    Returns:
        The scores by name.
    """
    likelihoods = [option for option, node in metric_nodes(config).items() if is_likelihood(node)]
    if likelihoods and config.devices > 1:
        raise UserError(f"{likelihoods[0]}: a likelihood is computed by itself, with devices=1")
    if config.devices > 1 and any(map(is_memorisation, metric_nodes(config).values())):
        raise UserError(BY_ITSELF)
    return launch(evaluate_on_this_process, config)


def evaluate_on_this_process(config: DictConfig) -> dict[str, float]:
    """The share of this process; see `evaluate`."""
    loaded, merged = load_with(config)
    nodes = metric_nodes(merged)
    likelihoods = [option for option, node in nodes.items() if is_likelihood(node)]
    folder = loaded.found.folder / "scores"
    if likelihoods:
        if len(nodes) > 1 or config.devices > 1:
            raise UserError(f"{likelihoods[0]}: a likelihood is computed by itself, with devices=1")
        if not loaded.recipe.codec.bounded:
            raise UserError(f"{likelihoods[0]}: bits per dimension are of pixels, and this run has latents")
        likelihood = build(nodes[likelihoods[0]], Likelihood, likelihoods[0])
        record = score_likelihood(loaded, likelihood, config.n, config.batch_size, config.seed)
        return publish(record, folder / f"nll_seed-{config.seed}_{digest_of(record.protocol)}")
    if any(map(is_memorisation, nodes.values())):
        return report_memorisation(loaded, nodes, config, folder)
    record = score_images(loaded, merged, config)
    if rank() == 0:
        return publish(record, recipe_folder(folder, record.protocol))
    return record.scores


def report_memorisation(
    loaded: LoadedRun, nodes: dict[str, DictConfig], config: DictConfig, folder: Path
) -> dict[str, float]:
    """Compares generated with training images; writes the record and a picture of the nearest neighbours."""
    if len(nodes) > 1 or config.devices > 1:
        raise UserError(BY_ITSELF)
    memorisation = build(nodes["metrics"], Memorisation, "metrics")
    record, picture = score_memorisation(loaded, memorisation, config.n, config.batch_size, config.seed)
    folder = folder / f"memorisation_seed-{config.seed}_{digest_of(record.protocol)}"
    scores = publish(record, folder)
    picture.save(folder / "nearest.png")
    log.info("%s  rows: generated, nearest training image, nearest held-out image", folder / "nearest.png")
    return scores


def score_images(loaded: LoadedRun, merged: DictConfig, config: DictConfig) -> Record:
    """The scores of generated images, all from one sampling pass; every process makes its batches."""
    if rank() == 0:
        warn_of_missing_signal(loaded.denoiser, loaded.recipe)
    recipe = loaded.recipe
    groups = ("metrics", "data", "codec", "conditioning")
    depends = OmegaConf.to_yaml(OmegaConf.masked_copy(merged, groups))
    key = (depends, config.per_class, config.cache, loaded.device)
    scores = shared("scores", key, lambda: scores_of(merged, recipe, config.per_class))
    if scores is None:
        raise UserError("metrics: this run has none; choose one, e.g. metrics=fid")
    try:
        labels = recipe.labels(range(config.n)) if config.per_class else None
        scores.check_counts(config.n, loaded.source, labels)
    except UserError as error:
        raise UserError(
            f"{error}; change n={config.n} or metrics{', or per_class' if config.per_class else ''}"
        ) from None
    scores.to(loaded.device)
    if scores.needs_reference:
        scores.set_references(loaded.source, rank(), world_size(), config.cache)
    scores.reset()
    batches = [
        range(first, min(first + config.batch_size, config.n))
        for first in range(0, config.n, config.batch_size)
    ]
    description = f"{scores.names}: generating"
    evaluations = 0
    for numbers in track(
        batches[rank() :: world_size()], description=description, transient=True, disable=rank() > 0
    ):
        (made,) = recipe.images(loaded.denoiser, numbers, config.batch_size)
        scores.update(made.images, made.labels)
        evaluations = max(evaluations, made.evaluations)
    evaluations = max(gathered(evaluations))
    values = scores.compute()
    return Record(values, scores.protocol(loaded.record(evaluations), recipe.codec.describe()))


def publish(record: Record, folder: Path) -> dict[str, float]:
    """Writes a record as <folder>/scores.json; prints the scores, and returns them with the network's evaluations."""
    path = folder / SCORES_FILE
    record.write(path)
    width = max(map(len, ("evaluations", *record.scores))) + 4
    lines = [f"{name:<{width}}{value:.5g}" for name, value in record.scores.items()]
    scores = dict(record.scores)
    if "recipe" in record.protocol:  # a likelihood has none
        evaluations = record.protocol["recipe"]["network_evaluations"]
        lines.append(f"{'evaluations':<{width}}{evaluations} of the network for an image")
        scores["evaluations"] = evaluations
    log.info("%s\n%s%s", "\n".join(lines), "protocol".ljust(width), path)
    return scores
