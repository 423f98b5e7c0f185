"""Configurations of earlier releases, as stored in checkpoints, in today's words."""

from typing import Any

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
NEW_OPTIONS: dict[str, Any] = {"labels": None, "per_class": False}

# Options that sources have got since.
NEW_DATA_OPTIONS: dict[str, dict[str, Any]] = {
    f"src.data.{name}": {"captions": False}
    for name in ("digits.Digits", "mnist.MNIST", "fashion_mnist.FashionMNIST")
}


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
            key: MOVED.get(value, value) if key == "_target_" else _renamed(value)
            for key, value in node.items()
        }
    return [_renamed(value) for value in node] if isinstance(node, list) else node
