"""Short texts for options, values and protocols."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

ABSENT = "–"
LONGEST = 60
UNCLEAR = ("true", "false", "none", "null", "auto", "default")


def natural(text: str) -> tuple[Any, ...]:
    """A key that sorts numbers in texts by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return tuple((0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts))


def shortened(value: Any, longest: int | None = LONGEST) -> str:
    """A value as a text of at most `longest` characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.rpartition(".")[2] if re.fullmatch(r"(\w+\.)+[A-Z]\w*", text) else text
    return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"


def concise(values: Iterable[str]) -> dict[str, str]:
    """Short texts for values such as "DDIM(eta=0.0, ...)": only the arguments in which those of one class differ."""
    parts = {value: re.fullmatch(r"(\w+)\((.*)\)", value) for value in values}
    classes: dict[str, list[list[str]]] = {}
    for match in parts.values():
        if match:
            classes.setdefault(match[1], []).append(re.split(r", (?=\w+=)", match[2]))
    short = {}
    for value, match in parts.items():
        words = [] if match is None else re.split(r", (?=\w+=)", match[2])
        kept = [word for word in words if any(word not in other for other in classes[match[1]])]
        text = value if match is None else match[1] + (f"({', '.join(kept)})" if kept else "")
        short[value] = shortened(text)
    return short


def in_words(options: Mapping[str, str]) -> str:
    """Options as a short text: values that speak for themselves without their name, e.g. "cosine, lr 0.001"."""
    values = Counter(options.values())
    return ", ".join(
        value
        if value[:1].isalpha() and value.lower() not in UNCLEAR and values[value] == 1
        else f"{name.rpartition('.')[2]} {value}"
        for name, value in options.items()
    )
