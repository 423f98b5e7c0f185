"""The model card (README.md) of an exported network."""

import json
from dataclasses import dataclass
from typing import Any

import yaml

from src.diffusion.parameterization import Parameterization
from src.diffusion.schedule import DiscreteSchedule, Schedule

SHOWN = 5
"""Levels in the table of the card."""


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        library: the format.
        network: its class and size.
        data: the training images.
        shape: (C, H, W) of the images.
        schedule, parameterization: give the network's input and output their meaning.
        scaling: how generated values become bytes.
        protocol: what images of the run depend on, as primitives.
        scores: the run's last scores by name.
        usage: a block of code.
    """

    library: str
    network: str
    data: str
    shape: tuple[int, int, int]
    schedule: Schedule
    parameterization: Parameterization
    scaling: str
    protocol: dict[str, Any]
    scores: dict[str, float]
    usage: str

    def text(self) -> str:
        """The card as Markdown."""
        head = {
            "library_name": self.library,
            "pipeline_tag": "unconditional-image-generation",
            "tags": ["diffusion"],
        }
        scores = [f"| {name} | {value:.4g} |" for name, value in self.scores.items()]
        parts = [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
            f"# {self.network}",
            f"A diffusion model of {self.data}, images of shape {' x '.join(map(str, self.shape))}. They are"
            f" decoded by {self.scaling}.",
            f"## Use\n\n{self.usage}",
            f"## What the network computes\n\n{self.meaning()}",
        ]
        if scores:
            table = "\n".join(["| score | value |", "| --- | --- |", *scores])
            parts.append(
                f"## Scores\n\nOf the training's last scoring; its protocol is in the run folder.\n\n{table}"
            )
        parts.append(f"## Protocol\n\n```json\n{json.dumps(self.protocol, indent=2, default=str)}\n```")
        return "\n\n".join(parts) + "\n"

    def meaning(self) -> str:
        """Input and output by formula, with the numbers of a few levels, so that a sampler can be checked."""
        low, high = self.schedule.t_min, self.schedule.t_max
        times = [low + (high - low) * i / (SHOWN - 1) for i in range(SHOWN)]
        if isinstance(self.schedule, DiscreteSchedule):
            times = sorted({float(round(time)) for time in times})
        rows = [
            "| t | alpha | sigma | label | c_in | c_skip | c_out |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for time, level in zip(times, self.schedule(times).scalars(), strict=True):
            try:
                numbers = self.parameterization.coefficients(level)
            except ZeroDivisionError:  # pure noise
                continue
            row = (time, level.alpha, level.sigma, self.parameterization.label(level), *numbers)
            rows.append(f"| {' | '.join(f'{float(number):.9g}' for number in row)} |")
        return (
            "With x_t = alpha x0 + sigma eps, the estimate is x0 = c_skip x_t + c_out F(c_in x_t, label), and"
            " eps = (x_t - alpha x0)/sigma. Channels of F beyond those of the image are for a learned variance.\n\n"
            + "\n".join(rows)
        )
