"""The job of `src.import_weights`: a run folder from the weights of other code."""

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from src.app.assemble import write_config
from src.app.build import resolve, trusting
from src.app.conditions import conditioning_of
from src.app.initial import mismatches
from src.app.messages import check_names
from src.app.options import CONF, IMPORT, check_options, check_values
from src.app.overrides import trusted_folders, written_out
from src.app.parts import codec_of, denoiser_of, source_of
from src.app.restore import NETWORK
from src.app.sweep.jobs import composed
from src.data.source import ImageSource
from src.errors import UserError
from src.interop.diffusers_folder import Folder, folder_at, network_of, process_of
from src.interop.network import Network
from src.interop.published import recognised
from src.runs.files import file_sha256, write_json
from src.runs.folder import CHECKPOINTS, ENVIRONMENT_FILE, checkpoints_by_step, locked
from src.runs.machine import environment
from src.training.checkpoint import AtomicCheckpointIO

log = logging.getLogger(__name__)

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
# The file of conf/model with the class of a network; its options are replaced.
CHOICES = {"src.model.UNet": "unet_ddpm", "src.model.ResamplingUNet": "unet_adm", "src.model.DiT": "dit_s"}


def import_weights(arguments: Sequence[str]) -> None:
    """Writes a run folder with one checkpoint, which is then sampled, scored and fine-tuned like any other.

    Args:
        arguments: the options in `IMPORT`, and those of src.train, which replace what the source says.

    Raises:
        UserError: the source cannot be read or is no network of ours, or the data do not fit it.
    """
    overrides = [part for argument in arguments for part in written_out(argument)]
    own = {option.name for option in IMPORT}
    given = dict(a.split("=", 1) for a in overrides if a.partition("=")[0] in own)
    options = check_values(IMPORT, given)
    overrides = [a for a in overrides if a.partition("=")[0] not in own]
    chosen = {argument.partition("=")[0] for argument in overrides}
    check_names("train", overrides, [CONF, *trusted_folders(overrides)])
    if "data" not in chosen:
        raise UserError("data is missing: name the images that the network was trained on, e.g. data=cifar10")
    out = Path(options["out"]).expanduser()
    if checkpoints_by_step(out / CHECKPOINTS):
        raise UserError(f"out={out}: this folder holds a run already; choose another")
    source = Path(options["source"]).expanduser()
    file, folder = file_of(source)
    try:
        # DataParallel, in which some published networks were saved, adds "module."
        weights = {name.removeprefix("module."): tensor.float() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"source={file}: it cannot be read as safetensors ({str(error).splitlines()[0]})"
        ) from None
    try:
        if folder is None:
            network, process = recognised(weights, options["attention_order"], options["head_channels"]), {}
        else:
            network, process = network_of(folder, weights), process_of(folder.scheduler, chosen)
        network.read(weights)
    except KeyError as error:
        raise UserError(
            f"source={source}: {error.args[0]} is missing: other architectures cannot be converted"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"source={source}: {error}") from None
    config = composed("train", [*choices(network, process, folder, chosen), *overrides])
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    check_options("train", config)
    with trusting(config.trust):
        source = source_of(config)
        network = network.for_data(source.num_classes)
        ours = network.read(weights)
        check_fit(config, source, network, ours)
    record = {"source": str(source), "sha256": file_sha256(file), "file": file.name}
    write_run(config, ours, record, options["step"], out)
    log.info("%s", summary(out, network, config))


def file_of(source: Path) -> tuple[Path, Folder | None]:
    """The file with the weights, and the folder of diffusers that it is in, if it is.

    Raises:
        UserError: there is no such file, or it is a pickle.
    """
    if source.is_dir():
        folder = folder_at(source)
        if folder is not None:
            if not folder.weights.is_file():
                refuse_pickles(source, sorted(folder.weights.parent.glob("*")))
                raise UserError(f"source={source}: {folder.weights} is missing")
            return folder.weights, folder
        files = sorted(source.glob("*.safetensors"))
        if len(files) == 1:
            return files[0], None
        refuse_pickles(source, sorted(source.glob("*")))
        raise UserError(
            f"source={source}: no config.json, and {len(files)} files *.safetensors; name one file"
        )
    if not source.is_file():
        raise UserError(f"source={source}: no such file or folder")
    if source.suffix != ".safetensors":
        refuse_pickles(source, [source])
        raise UserError(f"source={source}: give a file *.safetensors, or a folder of diffusers")
    return source, None


def refuse_pickles(source: Path, files: Sequence[Path]) -> None:
    """Refuses files that can run code when they are loaded.

    Raises:
        UserError: one of the files is such; says how to convert it.
    """
    found = next((file for file in files if file.suffix in PICKLES), None)
    if found is not None:
        raise UserError(
            f"source={source}: {found.name} is a pickle, which can run code when it is loaded, and is not read: convert"
            " it to safetensors where you trust it; docs/interop.md has the line for each kind of file"
        )


def choices(
    network: Network, process: dict[str, Any], folder: Folder | None, chosen: Collection[str]
) -> list[str]:
    """The command line of a training of this network, without options of groups that are chosen anew."""
    model = dict(network.model)
    found = {"model": CHOICES[model.pop("_target_")], **network.process, **process}
    if network.outputs == 2 and "learned" not in str(found.get("variance")):
        found["variance"] = "learned_range"
    if network.outputs == 2:
        found |= {"loss": "hybrid"}
    elif "learned" in str(found.get("variance")):
        found["variance"] = "large"
    if network.num_classes:
        found["conditioning"] = "class"
    if folder is not None and folder.decoder is not None:
        found |= {"codec": "autoencoder_kl", "codec.folder": str(folder.decoder)}
    found |= {"ema": "none"}
    found = {name: value for name, value in found.items() if name.partition(".")[0] not in chosen}
    words = [f"{name}={in_yaml(value)}" for name, value in found.items() if "." not in name]
    words += [f"++{name}={in_yaml(value)}" for name, value in found.items() if "." in name]
    return words + [f"++model.{name}={in_yaml(value)}" for name, value in model.items()]


def in_yaml(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, str):
        return value if value.isidentifier() else "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value)


def check_fit(config: DictConfig, source: ImageSource, network: Network, ours: dict[str, Tensor]) -> None:
    """Builds the run's network and checks that the weights are all of its weights.

    Raises:
        UserError: the images, the classes or an option do not fit.
    """
    codec = codec_of(config, source)
    channels, *sides = codec.shape
    square = network.side is None or sides == [network.side] * 2
    if channels != network.channels or not square:
        wanted = f"{network.channels} channels" + (
            f" and {network.side} pixels a side" if network.side else ""
        )
        raise UserError(
            f"data: the network is for images of {wanted}, and these have {' x '.join(map(str, codec.shape))}; choose"
            " the data it was trained on"
        )
    if network.num_classes not in (0, source.num_classes):
        raise UserError(
            f"data: the network has {network.num_classes} classes, and these data have {source.num_classes}"
        )
    conditioning = conditioning_of(config, source, codec)
    built = denoiser_of(config, codec, conditioning).network.state_dict()
    if unfit := mismatches(ours, built):
        name, what = next(iter(unfit.items()))
        what = what.replace("not in init", "not in the source").replace("in init", "in the source")
        raise UserError(
            f"source: {len(unfit)} weights do not fit the network, the first is {name} ({what}); see model.*"
        )


def write_run(
    config: DictConfig, ours: dict[str, Tensor], record: dict[str, str], step: int, out: Path
) -> None:
    """Writes the run folder.

    Raises:
        UserError: the checkpoint cannot be written.
    """
    content = {
        "config": resolve(config, "config"),
        "state_dict": {NETWORK + name: tensor for name, tensor in ours.items()},
        "callbacks": {},
        "global_step": step,
        "imported": record,
        "pytorch-lightning_version": lightning.__version__,
    }
    with locked(out):
        writer = AtomicCheckpointIO()
        writer.save_checkpoint(content, out / CHECKPOINTS / f"step_{step:08d}.ckpt")
        if writer.failures:
            raise UserError(f"out={out}: the checkpoint cannot be written, see above")
        write_config(config, out)
        write_json(out / ENVIRONMENT_FILE, {**environment(), "imported": record})


def summary(out: Path, network: Network, config: DictConfig) -> str:
    """What was imported, and the commands that follow."""
    numbers = ", ".join(f"{name}={value}" for name, value in network.model.items() if name != "_target_")
    return (
        f"network     {network.model['_target_'].rpartition('.')[2]}({numbers})\n"
        f"run         {out}\nNext:\n"
        f"  python -m src.sample run={out} n=64\n"
        f"  python -m src.evaluate run={out}\n"
        f"  python -m src.train init={out} ..."
    )
