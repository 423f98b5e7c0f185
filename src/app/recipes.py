"""How a run makes images: sampler, spacing, guidance, clipping and your own wrappers."""

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.app.build import build, check_value, class_of, resolve
from src.app.guides import guide_of, needs_run
from src.app.options import RUN_OPTIONS
from src.conditioning import Conditioning
from src.data.codec import Codec
from src.diffusion.denoiser import Denoiser, WrappedDenoiser, Wrapper
from src.diffusion.guidance import ClassifierFree, ClassifierGuidance, Projected
from src.diffusion.restoration import RePaint, Replacement, Restoration
from src.diffusion.sampler import DDPM, Dopri5, FlowMap, Restart, Sampler
from src.diffusion.spacing import Spacing
from src.errors import UserError
from src.generation.recipe import CLIPPING, Recipe

log = logging.getLogger(__name__)


def recipe_of(
    config: DictConfig,
    seed: int,
    denoiser: Denoiser,
    codec: Codec,
    conditioning: Conditioning | None,
    restoration: type[Restoration] | None = None,
) -> Recipe:
    """How images are made; its times and its wrappers are tried on the denoiser at once.

    Args:
        config: composed.
        seed: of the sampling noise.
        denoiser: the network's denoiser.
        codec: of its images.
        conditioning: of its images.
        restoration: the method that will be used around the sampler, if any.

    Raises:
        UserError: they do not fit.
    """
    numbers = resolve(config.sampler, "sampler")
    # the number of steps belongs to the spacing, but everyone looks for it at the sampler
    steps = numbers.pop("steps", None)
    if steps is None:
        raise UserError("sampler.steps is missing: give it in the sampler's file or as sampler.steps=...")
    check_value(int, steps, "sampler.steps")
    sampler = build(OmegaConf.create(numbers), Sampler, "sampler")
    check_guidance(config, conditioning, sampler, restoration)
    if isinstance(sampler, FlowMap):
        check_flow_map(config, sampler, steps, denoiser)
    arguments: dict[str, Any] = {}
    if needs_run(config.guidance):
        guide = guide_of(config, denoiser, codec, conditioning)
        arguments, conditioning = guide.arguments, guide.conditioning
    if (
        not codec.bounded
        and class_of(config.clipping) in CLIPPING
        and config.clipping.get("bound", 1.0) == 1.0
    ):
        log.info("clipping    none: the limit of 1 is that of pixels, and this run has latents")
        config = OmegaConf.merge(config, {"clipping": None})
    wrappers = wrappers_of(config, arguments, sampler, restoration)
    recipe = Recipe(
        sampler=sampler,
        spacing=build(config.spacing, Spacing, "spacing"),
        steps=steps,
        wrappers=tuple(wrappers.values()),
        codec=codec,
        conditioning=conditioning,
        seed=seed,
    )
    option, inner = "sampler", denoiser
    try:
        recipe.times(denoiser.schedule)
        for option, wrap in wrappers.items():  # noqa: B007 - named in the error
            inner = wrap(inner)
    except ValueError as error:
        raise UserError(f"{option}.{error}") from None
    except TypeError as error:  # a wrapper without a needed argument
        raise UserError(f"{option}: {error}") from None
    return recipe


def check_guidance(
    config: DictConfig,
    conditioning: Conditioning | None,
    sampler: Sampler,
    restoration: type[Restoration] | None = None,
) -> None:
    """Checks guidance against the network's conditioning, and warns of a network that was not trained for it.

    Raises:
        UserError: guidance of an unconditional network, or a momentum where steps are repeated.
    """
    found = class_of(config.guidance)
    if found is None or not issubclass(found, ClassifierFree):
        return
    if conditioning is None:
        raise UserError(
            "guidance: this network has no condition to be guided by; choose guidance=none, auto or classifier, or"
            " train with conditioning=class conditioning.dropout=0.1, or conditioning=text"
        )
    if issubclass(found, Projected) and config.guidance.get("momentum"):
        if isinstance(sampler, Dopri5):
            repeats, other = "sampler=dopri5", "a sampler of fixed steps"
        elif isinstance(sampler, Restart):
            repeats, other = "sampler=restart", "another sampler"
        elif issubclass(restoration or object, RePaint):
            repeats, other = "restoration=repaint", "another restoration"
        else:
            repeats = other = ""
        if repeats:
            raise UserError(
                f"guidance.momentum={config.guidance.momentum:g}: {repeats} repeats steps, along which a momentum is"
                f" not defined; choose guidance.momentum=0, or {other}"
            )
    if not conditioning.dropout and config.guidance.get("scale", 1) != 1:
        log.warning(
            "guidance: this network was trained with conditioning.dropout=0, so that its prediction without a condition"
            " is arbitrary; train with conditioning.dropout=0.1"
        )


def check_flow_map(config: DictConfig, sampler: FlowMap, steps: int, denoiser: Denoiser) -> None:
    """Checks what a sampler of average velocities is given.

    Raises:
        UserError: a network without a second time; or guidance or clipping, where steps do not lead to clean data.
    """
    try:
        sampler.check(denoiser.second_time, steps)
    except ValueError as error:
        raise UserError(f"sampler.{error}") from None
    if sampler.gamma == 1:
        return
    if config.guidance:
        raise UserError(
            "guidance: sampler=flow_map makes steps of the average velocity, along which a guided velocity changes;"
            " choose guidance=none, or sampler=euler, which uses the velocity at one time"
        )
    if config.clipping and steps > 1:
        raise UserError(
            "clipping: with sampler=flow_map in several steps, the estimate of x0 is no image; choose clipping=none"
        )


def wrappers_of(
    config: DictConfig,
    arguments: dict[str, Any],
    sampler: Sampler,
    restoration: type[Restoration] | None = None,
) -> dict[str, Wrapper]:
    """What makes the denoisers around the network's, by option, the innermost first: guidance, your own, clipping.

    Guidance by a classifier is the outermost one in ancestral sampling, whose `reverse` it changes after clipping. A
    restoration that changes predictions does not call it.

    Args:
        config: composed.
        arguments: further arguments of the guidance, from its second run.
        sampler: the sampler.
        restoration: the method that will be used around it, if any.
    """
    nodes = {"guidance": config.guidance}
    nodes |= {f"wrappers.{name}": node for name, node in (config.get("wrappers") or {}).items()}
    nodes["clipping"] = config.clipping
    calls_reverse = is_ancestral(sampler) and issubclass(restoration or Replacement, Replacement)
    found = class_of(config.guidance)
    if found is not None and issubclass(found, ClassifierGuidance) and calls_reverse:
        nodes["guidance"] = nodes.pop("guidance")
    wrappers = {}
    for option, node in nodes.items():
        if node and not isinstance(node, DictConfig):
            raise UserError(f"{option}={node}: give a class, e.g. {{_target_: mypackage.Mine}}")
        if node:
            content = {**OmegaConf.to_container(node, resolve=False), "_partial_": True}
            joined = arguments if option == "guidance" else {}
            if joined:
                content = {name: value for name, value in content.items() if name not in RUN_OPTIONS}
            resolved = OmegaConf.create(content, parent=node._get_parent())
            wrappers[option] = build(resolved, WrappedDenoiser, option, **joined)
    return wrappers


def is_ancestral(sampler: Sampler) -> bool:
    """Whether a sampler, or the one that it is made of, samples p(x_s | x_t)."""
    return any(isinstance(part, DDPM) for part in (sampler, *vars(sampler).values()))
