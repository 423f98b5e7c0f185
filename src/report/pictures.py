"""Grids of samples from the same noise, side by side, inlined as data URIs."""

import base64
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.report.run import Run
from src.report.subjects import Subject
from src.report.texts import shortened
from src.runs.files import open_regular, read_json
from src.runs.folder import check_contained

PREVIEW = re.compile(r"step_(\d+)\.png")
MOST_PIXELS = 1 << 24
WIDEST = 640
LOSSLESS = 64_000
"""Bytes. A larger PNG file is inlined as WebP of quality 90."""


@dataclass(frozen=True)
class Picture:
    """One grid.

    Attributes:
        name: of its run.
        note: how it was made, where that differs.
        source: its data URI.
        width: in pixels, of the image.
        height: likewise.
    """

    name: str
    note: str
    source: str
    width: int
    height: int


def picture_groups(subjects: Sequence[Subject]) -> list[tuple[str, list[Picture]]]:
    """The last preview of each run and the grids of `src.sample`, grouped by the noise they were made from.

    Returns:
        What is equal in a group, and its pictures. Within a group image i of each grid starts from the same noise.
    """
    groups: dict[str, list[Picture]] = defaultdict(list)
    for subject in subjects:
        if subject.run is None:
            continue
        folder = subject.run.folder / "samples"
        try:
            check_contained(subject.run.folder, ["samples"])
        except UserError as error:
            subject.run.problems.append(str(error))
            continue
        made = [*_previews(subject.run, folder), *_sampled(subject.run, folder)]
        for heading, note, path in made:
            picture = inlined(path, subject.name, note)
            if picture is not None:
                groups[heading].append(picture)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _previews(run: Run, folder: Path) -> list[tuple[str, str, Path]]:
    """The heading, the note and the file of the last preview."""
    found = {
        int(match[1]): path for path in folder.glob("step_*.png") if (match := PREVIEW.fullmatch(path.name))
    }
    if not found:
        return []
    step, options = max(found), run.options
    size, channels = options.get("data.image_size", "?"), options.get("data.channels", "?")
    labels = next((options[key] for key in ("labels", "prompts") if options.get(key) is not None), None)
    conditioning = options.get("conditioning._target_")
    words = [
        f"{options.get('callbacks.sample_images.n', '?')} previews from the noise of seed"
        f" {options.get('generation.seed', '?')}",
        f"{' x '.join(map(str, size)) if isinstance(size, list) else f'{size} x {size}'} pixels",
        "grey" if channels == 1 else f"{channels} channels",
        *([f"conditioned by {shortened(conditioning)}"] if conditioning else []),
        *([f"labels {shortened(labels)}"] if labels is not None else []),
    ]
    sampler = f"{shortened(options.get('sampler._target_', '?'))}, {options.get('sampler.steps', '?')} steps"
    return [(", ".join(words), f"step {step:,}, {sampler}", found[step])]


def _sampled(run: Run, folder: Path) -> list[tuple[str, str, Path]]:
    """Those of the grids of `src.sample`."""
    made = []
    for path in sorted(folder.glob("*/grid.png")):
        try:
            recipe = read_json(path.with_name("recipe.json"), dict[str, Any])
        except (OSError, UserError):
            continue
        made_by = {key: shortened(recipe.get(key, "?")) for key in ("task", "n", "seed", "labels")}
        heading = "{task}: {n} images from the noise of seed {seed}, labels {labels}".format(**made_by)
        size = run.options.get("data.image_size", "?")
        step, sampler, steps = (
            shortened(recipe.get(key, "?")) for key in ("training_steps", "sampler", "steps")
        )
        made.append((f"{heading}, size {size}", f"step {step}, {sampler}, {steps} steps", path))
    return made


def inlined(path: Path, name: str, note: str) -> Picture | None:
    """A PNG file as a data URI, decoded and encoded again; None if it is damaged or too large."""
    from PIL import Image

    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            image.load()
            picture = image.convert("RGB" if image.mode not in ("L", "RGB") else image.mode)
    except (OSError, UserError, ValueError, SyntaxError):
        return None
    if picture.width > WIDEST:
        picture.thumbnail((WIDEST, MOST_PIXELS))
    content, kind = BytesIO(), "png"
    picture.save(content, "PNG", optimize=True)
    if content.tell() > LOSSLESS:
        content, kind = BytesIO(), "webp"
        picture.save(content, "WEBP", quality=90)
    source = f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
    return Picture(name, note, source, *picture.size)
