"""Score a trained run: python -m src.evaluate run=<run folder or checkpoint> (see --help)."""

import logging
from pathlib import Path
from typing import Any

from src.app.cli import run
from src.runs.files import write_json
from src.runs.folder import recipe_folder


def evaluate(config: Any) -> dict[str, float]:
    """Generates images and scores them, or tells the likelihood of given ones; writes scores with their protocol.

    Args:
        config: conf/evaluate.yaml, composed.

    Returns:
        The scores by name.
    """
    from rich.progress import track

    from src.app import load as loading
    from src.evaluation import likelihood as nll
    from src.generation.recipe import warn_of_missing_signal

    loaded = loading.load_with(config)
    likelihood = nll.likelihood_of(loaded.config)
    if likelihood is not None:
        record = nll.evaluate(loaded, likelihood, config.n, config.batch_size, config.seed)
        return publish(record, nll.folder(loaded.found.folder / "scores", record["protocol"]))
    warn_of_missing_signal(loaded.denoiser, loaded.generation)
    score = loading.score_of(loaded, config.cache)
    generation = loaded.generation
    batches = generation.images(loaded.denoiser, range(config.n), config.batch_size)
    total = -(-config.n // config.batch_size)
    for images in track(batches, description=f"{score.name}: generating", total=total, transient=True):
        score.update(images)
    record = {"scores": score.compute(), "protocol": loaded.protocol(score)}
    return publish(record, recipe_folder(loaded.found.folder / "scores", record["protocol"]))


def publish(record: dict[str, Any], folder: Path) -> dict[str, float]:
    """Writes scores and protocol as <folder>/scores.json, prints and returns the scores."""
    path = folder / "scores.json"
    write_json(path, record)
    width = max(map(len, ("evaluations", *record["scores"]))) + 4
    lines = [f"{name:<{width}}{value:.5g}" for name, value in record["scores"].items()]
    if "recipe" in record["protocol"]:  # a likelihood has none
        evaluations = record["protocol"]["recipe"]["network_evaluations"]
        lines.append(f"{'evaluations':<{width}}{evaluations} of the network for an image")
    logging.getLogger(__name__).info("%s\n%s%s", "\n".join(lines), "protocol".ljust(width), path)
    return record["scores"]


def main() -> None:
    """The command line."""
    run("evaluate", evaluate)


if __name__ == "__main__":
    main()
