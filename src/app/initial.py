"""The weights from which a new training starts: `init=<run folder or checkpoint>`."""

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from src.app.options import effect_of
from src.app.restore import config_of, weights_of
from src.errors import UserError
from src.runs.files import file_sha256
from src.runs.folder import find_run
from src.runs.processes import rank
from src.training.reading import read_checkpoint

log = logging.getLogger(__name__)

LISTED = 3
# Groups that give the network's input and output their meaning.
MEANING = ("schedule", "parameterization", "codec", "conditioning")


def initialise(network: nn.Module, config: DictConfig) -> dict[str, Any]:
    """Copies the weights of another run into a network. Optimiser, averages and data start anew.

    Args:
        network: freshly initialised; where `init_partial` allows it, parts that do not fit stay as they are.
        config: of the training, with `init`, `init_weights` and `init_partial`.

    Returns:
        The origin of the weights as primitives, for the run folder.

    Raises:
        UserError: there is no such run; its network is of another class or does not fit.
    """
    found = find_run(config.init, option="init")
    content = read_checkpoint(found.checkpoint)
    own = config_of(content, found)
    ours, theirs = (str(each.model._target_).rpartition(".")[2] for each in (config, own))
    if own.model._target_ != config.model._target_:
        raise UserError(
            f"init={config.init}: its network is {theirs}, and this training's is {ours}: choose the same model, or"
            " another run"
        )
    state, name, _ = weights_of(found, content, own, config.init_weights)
    unfit = mismatches(state, network.state_dict())
    fitting = {key: tensor for key, tensor in state.items() if key not in unfit}
    if unfit and (not config.init_partial or not fitting):
        advice = "choose the same options of model, or start these parts untrained with init_partial=true"
        if not fitting:
            advice = "no part fits: choose the same options of model, or another run"
        raise UserError(f"init={config.init}: {len(unfit)} parts do not fit: {_listed(unfit)}; {advice}")
    network.load_state_dict(fitting, strict=False)
    if rank() == 0:
        if unfit:
            log.warning("init: %d parts do not fit and start untrained: %s", len(unfit), _listed(unfit))
        for group in MEANING:
            before, after = (_as_text(each.get(group), group) for each in (own, config))
            if before != after:
                log.warning(
                    "init: the weights were trained with another %s: %s, now %s", group, before, after
                )
    return {
        "run": str(found.folder),
        "checkpoint": str(found.checkpoint),
        "sha256": file_sha256(found.checkpoint),
        "training_steps": content["global_step"],
        "weights": name,
        "untrained": sorted(unfit),
    }


def mismatches(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, str]:
    """The weights that only one network has, or that have different shapes: name -> what differs."""
    found = {}
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in ours:
            found[name] = "not in this network"
        elif name not in theirs:
            found[name] = "not in init"
        elif theirs[name].shape != ours[name].shape:
            shapes = ("x".join(map(str, each[name].shape)) or "scalar" for each in (theirs, ours))
            found[name] = " in init, here ".join(shapes)
    return found


def _listed(unfit: Mapping[str, str]) -> str:
    words = [f"{name} ({what})" for name, what in list(unfit.items())[:LISTED]]
    more = f" and {len(unfit) - LISTED} more" if len(unfit) > LISTED else ""
    return ", ".join(words) + more


def _as_text(node: Any, group: str) -> str:
    """The class of a group and the options that make it another experiment, so not where a cache lies."""
    return _called(OmegaConf.to_container(node, resolve=True), group) if node else "none"


def _called(options: dict[str, Any], name: str) -> str:
    words = []
    for key, value in options.items():
        option = f"{name}.{key}"
        if key != "_target_" and effect_of(option) == "experiment":
            words.append(f"{key}={_called(value, option) if isinstance(value, dict) else value}")
    return f"{str(options.get('_target_', '')).rpartition('.')[2]}({', '.join(words)})"
