"""Captions made from class names."""

from collections.abc import Sequence

from torch import Tensor

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES = ("the digit {}", "a handwritten {}")


def from_templates(labels: Tensor, names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Caption i is template i mod len(templates), filled in with the name of class labels[i].

    Args:
        labels: int64 (n,).
        names: of the classes.
        templates: contain {} where the name is inserted.
    """
    return [templates[i % len(templates)].format(names[label]) for i, label in enumerate(labels.tolist())]
