"""What a network is conditioned on, and the classes and prompts of sampled images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.app.build import build, class_of, takes
from src.conditioning import ByClass, Conditioning
from src.data.codec import Codec
from src.data.examples import Examples
from src.data.source import ImageSource
from src.diffusion.guidance import ClassifierGuidance
from src.errors import UserError
from src.runs.files import Damaged, open_regular


def conditioning_of(config: DictConfig, source: ImageSource, codec: Codec) -> Conditioning | None:
    """What the network is conditioned on, with the classes or prompts of sampled images.

    A text encoder is also given to the source, for its captions. Images come from the validation split.

    Raises:
        UserError: prompts or classes of a network that is not conditioned on them, a class that does not exist, no
            text encoder, or a condition that does not suit the images.
    """
    joined: dict[str, Any] = {}
    prompts = prompts_of(config)
    if config.conditioning and takes(config.conditioning, "captions"):
        joined = {"prompts": prompts, "captions": lambda: captions_of(source)}
    elif prompts is not None:
        raise UserError(
            "prompts: this network is not conditioned on text; leave them out, or train with conditioning=text"
        )
    if config.conditioning and takes(config.conditioning, "examples"):
        joined["examples"] = Examples(source, codec)
    conditioning = build(config.conditioning, Conditioning, "conditioning", **joined)
    if conditioning is not None:
        try:
            conditioning.check(codec.shape)
        except ValueError as error:
            raise UserError(f"conditioning.{error}") from None
    if conditioning is not None and "image" in conditioning.kinds and not codec.bounded:
        raise UserError("conditioning: low-resolution images are made of pixels; choose codec=pixels")
    source.text_encoder = getattr(conditioning, "encoder", None)
    if conditioning is None and issubclass(class_of(config.guidance) or object, ClassifierGuidance):
        return None  # the classes are those of the classifier
    return with_labels(conditioning, config, source)


def with_labels(
    conditioning: Conditioning | None, config: DictConfig, source: ImageSource
) -> Conditioning | None:
    """A conditioning with the classes of sampled images that `labels` names.

    Raises:
        UserError: a class that does not exist, or classes for a network that is not conditioned on them.
    """
    if config.labels is None:
        return conditioning
    labels = config.labels if isinstance(config.labels, int | str) else list(config.labels)
    if not isinstance(conditioning, ByClass):
        raise UserError(
            f"labels={labels}: this network is not conditioned on classes; leave labels out, or train with"
            " conditioning=class"
        )
    if labels in ("balanced", "random"):
        return conditioning.with_labels(labels)
    numbers = [class_number(label, source) for label in (labels if isinstance(labels, list) else [labels])]
    try:
        return conditioning.with_labels(numbers)
    except ValueError as error:
        raise UserError(f"{error}{_names(source)}") from None


def prompts_of(config: DictConfig) -> list[str] | None:
    """The prompts of sampled images: a list, or the lines of a text file; None if none are given.

    Raises:
        UserError: the file cannot be read, or there is no text.
    """
    prompts = config.get("prompts")
    if prompts is None:
        return None
    if isinstance(prompts, str) and prompts.endswith(".txt"):
        try:
            with open_regular(Path(prompts)) as file:
                lines = file.read().decode().splitlines()
            prompts = [line.strip() for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError, Damaged) as error:
            raise UserError(f"prompts={config.prompts}: the file cannot be read ({error})") from None
    elif isinstance(prompts, str):
        prompts = [prompts]
    if not prompts:
        raise UserError(f"prompts={config.prompts}: there is no text in it")
    return list(prompts)


def captions_of(source: ImageSource) -> Sequence[str]:
    """The captions of the validation split."""
    source.prepare()
    return source.split("validation").captions


def class_number(label: int | str, source: ImageSource) -> int:
    """The number of a class, which may be given by its name.

    Raises:
        UserError: there is no class of this name.
    """
    if isinstance(label, int):
        return label
    if label not in source.class_names:
        raise UserError(
            f"labels={label}: choose balanced, random, or classes, 0 to {source.num_classes - 1}{_names(source)}"
        )
    return source.class_names.index(label)


def _names(source: ImageSource) -> str:
    """The names of the classes, where they are more than the numbers."""
    names = source.class_names
    if names == [str(number) for number in range(len(names))]:
        return ""
    return f": {', '.join(names[:20] + ['...'] * (len(names) > 20))}"
