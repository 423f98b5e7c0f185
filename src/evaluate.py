"""Score a trained run: python -m src.evaluate run=<run folder or checkpoint> (see --help)."""

from typing import Any

from src.command_line import run
from src.run_folder import recipe_folder, write_json


def evaluate(config: Any) -> dict[str, float]:
    """Generates images, scores them and writes the scores with their protocol.

    Args:
        config: conf/evaluate.yaml, composed.

    Returns:
        The scores by name.
    """
    import logging

    from rich.progress import track

    from src import loading

    loaded = loading.load_with(config)
    score = loading.score_of(loaded, config.cache)
    generation = loaded.generation
    batches = generation.images(loaded.denoiser, range(config.n), config.batch_size)
    total = -(-config.n // config.batch_size)
    for images in track(batches, description=f"{score.name}: generating", total=total, transient=True):
        score.update(images)
    scores = score.compute()
    record = {"scores": scores, "protocol": loaded.protocol(score)}
    path = recipe_folder(loaded.found.folder / "scores", record["protocol"]) / "scores.json"
    write_json(path, record)
    lines = [f"{name:<12}{value:.5g}" for name, value in scores.items()]
    logging.getLogger(__name__).info("%s\nprotocol    %s", "\n".join(lines), path)
    return scores


def main() -> None:
    """The command line."""
    run("evaluate", evaluate)


if __name__ == "__main__":
    main()
