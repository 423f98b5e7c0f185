"""Draw images from a trained run: python -m src.sample run=<run folder or checkpoint> n=64 (see --help)."""

from pathlib import Path
from typing import Any

from src.command_line import run
from src.run_folder import recipe_folder, write_json


def sample(config: Any) -> dict[str, float]:
    """Writes a grid, the single images and, on request, an animation of the denoising.

    Args:
        config: conf/sample.yaml, composed.

    Returns:
        Nothing: pictures have no score.
    """
    import logging

    import torch
    from rich.progress import track

    from src import loading
    from src.pictures import animation, image_grid, save_images

    loaded = loading.load_with(config)
    generation = loaded.generation
    recipe = loaded.recipe()
    folder = Path(config.out or recipe_folder(loaded.found.folder / "samples", recipe))
    batches = generation.images(loaded.denoiser, range(config.n), config.batch_size)
    total = -(-config.n // config.batch_size)
    drawn = []
    for images in track(batches, description="sampling", total=total, transient=True):
        save_images(images, folder / "images", first=len(drawn))
        drawn.extend(images)
    write_json(folder / "recipe.json", loaded.recipe())  # once more: now with the evaluations counted
    image_grid(torch.stack(drawn[:1024])).save(folder / "grid.png")
    log = logging.getLogger(__name__)
    log.info("grid        %s\nimages      %s (%d)", folder / "grid.png", folder / "images", config.n)
    if config.gif:
        states = generation.trajectory(loaded.denoiser, range(min(config.n, 64)))
        animation(track(states, description="animation", total=generation.steps + 1, transient=True)).save(
            folder / "denoising.gif"
        )
        log.info("animation   %s", folder / "denoising.gif")
    return {}


def main() -> None:
    """The command line."""
    run("sample", sample)


if __name__ == "__main__":
    main()
