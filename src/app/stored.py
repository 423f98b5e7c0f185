"""The configuration that a run stored in its checkpoints, read as data: it may be untrusted or of an earlier release.

Hydra does not parse it. It names classes of `src`, of torch.optim and of the packages that this command line trusts,
and their numbers. Its texts are texts: no interpolation is resolved, so no environment variable is read. Loggers, the
Trainer and callbacks are those of conf/ with the stored numbers. Folders that are written to, and what else belongs to
one start (the effect "once" in `src.app.options`), come from this command line and its defaults.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch.nn.modules.module import register_module_parameter_registration_hook

from src.app.build import build, find_class, trusted
from src.app.conditions import conditioning_of
from src.app.options import CONF, OPTIONS, groups_of
from src.app.parts import codec_of, network_of, source_of
from src.diffusion.variance import Variance
from src.errors import UserError
from src.training.reading import read_checkpoint

# Classes that have moved.
MOVED = {
    "src.nll.BoundBits": "src.evaluation.likelihood.BoundBits",
    "src.nll.FlowBits": "src.evaluation.likelihood.FlowBits",
}
NEW_GROUPS: dict[str, Any] = {
    "codec": {"_target_": "src.data.codec.Pixels"},
    "guidance": None,
    "wrappers": {},
}
NEW_OPTIONS: dict[str, Any] = {
    "labels": None,
    "per_class": False,
    "init": None,
    "init_weights": "ema",
    "init_partial": False,
    "coupling": {"_target_": "src.training.coupling.Independent"},
    "augmentation": None,
    "regularizer": None,
}

# Options that sources have got since.
NEW_DATA_OPTIONS: dict[str, dict[str, Any]] = {
    f"src.data.{name}": {"captions": False}
    for name in ("digits.Digits", "mnist.MNIST", "fashion_mnist.FashionMNIST")
}
# Name of the continued training's configuration, and of the stored choice of each group.
CONTINUED, STORED = "continued", "stored"
# Options that follow another when it is changed; stored as numbers.
FOLLOWING = {"lr_schedule.total_steps": "trainer.max_steps", "ema.batch_size": "batch_size"}
# Groups of which a stored configuration gives only numbers, for classes of conf/.
NUMBERS_ONLY = {"callbacks", "logger", "trainer"}
LONGEST = 1_000_000
"""Characters of all stored texts."""
LONGEST_LIST = 1000
# Groups on which the shapes of the weights depend.
GROUPS_OF_NETWORK = ("data", "codec", "conditioning", "augmentation", "model", "variance")


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the groups and names of this release.

    Args:
        config: primitives only; left as it is.
    """
    config = _renamed(config)
    config["data"] = NEW_DATA_OPTIONS.get(config["data"].get("_target_"), {}) | config["data"]
    model, data = config["model"], config["data"]
    for name in ("image_size", "channels"):
        if name in model and model[name] == data.get(name):
            del model[name]  # follows the data
    if "class_conditional" in config:
        by_class = {
            "_target_": "src.conditioning.ByClass",
            "num_classes": config["data"]["num_classes"],
            "dropout": 0.0,
        }
        config["conditioning"] = by_class if config.pop("class_conditional") else None
        config = NEW_GROUPS | config
        if "Learned" in str((config.get("variance") or {}).get("_target_")):
            config["model"].pop("out_channels", None)  # follows the variance
        if str(config["loss"].get("_target_")).endswith("VariationalLoss"):
            config["loss"] = {"_target_": config["loss"]["_target_"]}
    return NEW_OPTIONS | config


def _renamed(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: MOVED.get(value, value) if key == "_target_" and isinstance(value, str) else _renamed(value)
            for key, value in node.items()
        }
    return [_renamed(value) for value in node] if isinstance(node, list) else node


def read_config(
    content: Mapping[str, Any], origin: Path, encoder: str | None = None, decoder: str | None = None
) -> dict[str, Any]:
    """The stored configuration of a checkpoint in the words of this release, checked, for OmegaConf.

    Args:
        content: of the checkpoint.
        origin: its file, for messages.
        encoder, decoder: where the text encoder and the autoencoder lie now; None for the stored place.

    Returns:
        Groups and single options. Texts are escaped; options of one start have this release's defaults. The groups in
        `NUMBERS_ONLY` are not checked: see `continue_with`.

    Raises:
        UserError: it is no configuration of this project, names a class that it may not name, or describes another
            network than that of the weights.
    """
    groups = {name for name in groups_of("train") if (CONF / name).is_dir()}
    try:
        config = upgrade(content["config"])
        lengths = 0
        for group in groups & config.keys():
            if not isinstance(config[group], dict | None):
                raise TypeError(group)
        for value in _leaves(config):
            lengths += len(value) if isinstance(value, str) else 0
            if lengths > LONGEST or not isinstance(value, str | int | float | bool | None):
                raise TypeError("value")
        config = _escaped(config)
        for group in ("wrappers", *groups - NUMBERS_ONLY):
            check_classes(config.get(group), group)
        for group in ("launcher", "hparams_search"):
            config.pop(group, None)
        _own_cache(config["data"], "data")
        _own_cache(config["codec"], "codec")
        if decoder and "folder" not in config["codec"]:
            raise UserError("codec.folder: this run has no autoencoder; leave it out")
        config["codec"] |= {"folder": decoder} if decoder else {}
        if "encoder" in (config["conditioning"] or {}):
            _own_cache(config["conditioning"]["encoder"], "conditioning.encoder")
            config["conditioning"]["encoder"]["name"] = encoder or config["conditioning"]["encoder"]["name"]
        elif encoder:
            raise UserError("conditioning.encoder.name: this run has no text encoder; leave it out")
        _check_network(config, content["state_dict"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{origin} does not contain a configuration of this project") from None
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return config


def check_classes(node: Any, option: str) -> None:
    """Checks the classes in a stored node and below it.

    Raises:
        UserError: one is none of `src`, torch.optim or a trusted package.
    """
    if isinstance(node, dict):
        if "_target_" in node:
            find_class(node, option, ("src.", "torch.optim.", *trusted()))
        for name, value in node.items():
            check_classes(value, f"{option}.{name}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            check_classes(value, f"{option}.{number}")


def _leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        if not all(isinstance(key, str | int) for key in node):
            raise TypeError("key")
        node = list(node.values())
    if isinstance(node, list):
        if len(node) > LONGEST_LIST:
            raise TypeError("list")
        for value in node:
            yield from _leaves(value)
    else:
        yield node


def _escaped(node: Any) -> Any:
    """The node with texts that OmegaConf takes literally."""
    if isinstance(node, dict):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escaped(value) for value in node]
    # backslashes count only in front of "${"
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


def _own_cache(node: dict[str, Any], option: str) -> None:
    """Replaces the stored folder of a cache by the default of the node's class: files in it are written and deleted."""
    if "cache" in node:
        parameters = inspect.signature(find_class(node, option, ("src.", *trusted()))).parameters
        node["cache"] = parameters["cache"].default


def _check_network(config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Builds the network of a stored configuration without memory, and compares it with the stored weights.

    Absurd sizes would otherwise take all memory, or forever. Networks of trusted packages are not checked: they may not
    be built without memory.

    Raises:
        UserError: it has other weights.
    """
    if not config["model"]["_target_"].startswith("src."):
        return
    prefix = "loss.denoiser.network."
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items() if name.startswith(prefix)}
    used = {name: config.get(name) for name in GROUPS_OF_NETWORK}
    parts = OmegaConf.create({**used, "labels": None, "guidance": None})
    source = source_of(parts)
    codec = codec_of(parts, source)
    conditioning = conditioning_of(parts, source, codec)
    outputs = build(parts.variance, Variance, "variance").outputs
    with torch.device("meta"), _at_most(len(stored)):
        network = network_of(parts, codec, conditioning, outputs)
    built = {prefix + name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if different := sorted(
        name for name in stored.keys() | built.keys() if stored.get(name) != built.get(name)
    ):
        raise UserError(f"model: {different[0]} does not have the shape of the stored weights")


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stops the construction of a network with more parameters, which could take forever."""
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > parameters:
            raise RuntimeError(f"more than the {parameters} stored weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def continue_with(
    checkpoint: Path, arguments: list[str], encoder: str | None = None, decoder: str | None = None
) -> None:
    """Registers the configuration of a training that is continued, as `CONTINUED`.

    It is conf/train.yaml with the stored choice of each group, `STORED`, and the stored single options. The command
    line applies to it as to any other: a choice replaces the stored one, an option changes it.

    Args:
        checkpoint: the file.
        arguments: the command line without `ckpt`.
        encoder, decoder: where the text encoder and the autoencoder lie now; None for the stored place.

    Raises:
        UserError: see `read_config`; or a callback or logger is of a class that is not taken from a run folder.
    """
    config = read_config(read_checkpoint(checkpoint), checkpoint, encoder, decoder)
    for option, followed in FOLLOWING.items():
        node, name = _place(config, option)
        other, followed_name = _place(config, followed)
        if name in node and node[name] == other.get(followed_name):
            node[name] = f"${{{followed}}}"
    trainer = (config.get("trainer") or {}) | {"_target_": _conf("trainer", "auto")["_target_"]}
    trainer.pop("profiler", None)  # it writes to a folder
    watching = {"checkpoints": _conf("callbacks", "checkpoints")["checkpoints"]} | (
        config.get("callbacks") or {}
    )
    config |= {"trainer": trainer, "callbacks": watching, "logger": config.get("logger") or {}}
    for argument in arguments:
        if re.match(r"\+\w+\.", argument):  # a stored option, added again
            node, name = _place(config, argument[1:].partition("=")[0])
            node.pop(name, None)
    replaced = {argument.partition("=")[0] for argument in arguments}
    for group in {"callbacks", "logger"} - replaced:
        config[group] = {
            name: {} if f"~{group}.{name}" in replaced else _watching(group, name, node)
            for name, node in config[group].items()
        }
    check_classes({name: value for name, value in trainer.items() if name != "_target_"}, "trainer")
    _register(config)


def _conf(group: str, choice: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / group / f"{choice}.yaml").read_text(encoding="utf-8")) or {}


def _place(config: dict[str, Any], option: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds an option, an empty one if there is none, and the last part of its name."""
    *parents, name = option.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else {}), name


def _watching(group: str, name: str, node: Any) -> Any:
    """A stored callback or logger: one of conf/ with the stored numbers, or one of a trusted package.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(node, dict):
        raise UserError(f"{group}.{name}={node}: this is no part of a configuration")
    target = str(node.get("_target_", ""))
    numbers = {key: value for key, value in node.items() if key != "_target_"}
    check_classes(numbers, f"{group}.{name}")
    if target.startswith(trusted()):
        find_class(node, f"{group}.{name}", trusted())
        return node
    if not target and group == "callbacks":  # numbers of a debug preset, for a callback that was not chosen
        return numbers
    files = (CONF / group).glob("*.yaml")
    ours = {key: node for path in files for key, node in _conf(group, path.stem).items() if key != "defaults"}
    if name not in ours:
        raise UserError(
            f"{group}.{name}: {target[:100]} is not taken from a run folder, which may be untrusted: give it again with"
            f" '+{group}.{name}={{_target_: ...}}', or leave it out with '~{group}.{name}'"
        )
    kept = ("project", "tags") if group == "logger" else numbers  # no logger's folder
    return ours[name] | {key: value for key, value in numbers.items() if key in kept}


def _register(config: dict[str, Any]) -> None:
    """Stores the choices and the primary configuration where Hydra finds them."""
    store = ConfigStore.instance().store
    primary = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))
    for entry in primary["defaults"]:
        for group in entry if isinstance(entry, dict) else ():
            if entry[group] is not None and group in config:
                node = config[group] or {}
                if "defaults" in node:  # Hydra would compose what it names
                    raise UserError(f"{group}.defaults: no such option")
                store(group=group, name=STORED, node=node)
                entry[group] = STORED
    for option in OPTIONS["train"]:
        node, name = _place(config, option.name)
        if option.effect != "once" and name in node:
            *parents, _ = option.name.split(".")
            place = primary
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = node[name]
    store(name=CONTINUED, node=primary)
