"""Every single option of the entry points: its type, default, help, and what changing it does to a resumed training.

The groups (schedule, model, ...) are chosen in conf/<entry point>.yaml; their options are the arguments of the classes
that conf/<group>/<choice>.yaml names, with the types and limits of those constructors.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

CONF = Path(__file__).parents[2] / "conf"

Effect = Literal["none", "order", "tuning", "experiment", "once"]
"""What a changed option means for a training that is resumed.

none        the numbers do not depend on it
order       the same images in the same order, rounded differently, in part with other draws
tuning      optimiser and learning-rate schedule: refused like `experiment`; with allow_changes=true the new values are
            taken and the optimiser's state is kept
experiment  another experiment: refused unless allow_changes=true
once        belongs to one start and is never taken from a run folder; loggers are, by name
"""

ENTRY_POINTS = ("train", "sample", "evaluate", "export")


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: as it is typed; dotted where it is nested.
        default: its value, "???" where it must be given.
        help: one line.
        kind: type of its value.
        least: smallest number that is allowed.
        optional: whether null is allowed.
        choices: words that are allowed besides `kind`, or instead of it where `kind` is None.
        effect: see `Effect`; of training's options.
    """

    name: str
    default: Any
    help: str
    kind: Any = None
    least: int | None = None
    optional: bool = False
    choices: tuple[str, ...] = ()
    effect: Effect = "experiment"

    def annotation(self) -> Any:
        """The type as pydantic understands it."""
        from annotated_types import Ge, Gt

        wanted: Any = Literal[self.choices] if self.choices else None
        if self.kind is not None:
            kind: Any = self.kind
            if self.least is not None:
                kind = Annotated[kind, Ge(self.least)]
            elif self.kind is float:
                kind = Annotated[kind, Gt(0)]
            wanted = kind if wanted is None else wanted | kind
        return wanted | None if self.optional else wanted


TRUST = Option(
    "trust",
    [],
    "packages outside this repository whose classes a _target_ may name, e.g. trust=[mypackage]",
    list[str],
    effect="once",
)
WRAPPERS = Option(
    "wrappers",
    {},
    "denoisers around the network's, inside the clipping: '+wrappers.mine={_target_: mypackage.Mine}'",
    dict,
    effect="none",
)
PROMPTS = Option(
    "prompts",
    None,
    'texts of sampled images: prompts=["a red heart",cat], or a file.txt with one on each line; null is the'
    " run's own, in training the captions of the validation split",
    list[str] | str,
    optional=True,
    effect="none",
)
LABELS = Option(
    "labels",
    None,
    "classes of sampled images: balanced (image i has class i mod number), random, a class by number or name, or a list"
    " that is repeated, e.g. [3,5,5]; null is the run's own, in training balanced",
    int | str | list[int | str],
    optional=True,
    effect="none",
)
PER_CLASS = Option(
    "per_class",
    False,
    "also score the images of each class by themselves, as <score>/class_<number>",
    bool,
    effect="none",
)
CACHE = Option(
    "cache", "${oc.env:DIFFUSION_LAB_CACHE,.cache}", "folder of cached statistics", str, effect="once"
)

SWEEP = (
    Option(
        "sweep",
        None,
        "with -m: the folder of a sweep to continue; the same command finds it by itself",
        str,
        optional=True,
        effect="once",
    ),
    Option("rerun_failed", False, "with -m: run the jobs that failed again", bool, effect="once"),
    Option(
        "interactions",
        False,
        "with -m: also print the mean score of every pair of varied options, and how far they depend on each other",
        bool,
        effect="once",
    ),
)

TRAIN = (
    Option(
        "seed",
        0,
        "decides weights, data order, times, noise, flips and dropout; sampling has its own",
        int,
        least=0,
    ),
    Option(
        "batch_size",
        64,
        "global: over all devices and accumulated micro-batches",
        int,
        least=1,
        effect="order",
    ),
    Option(
        "max_device_batch",
        None,
        "largest batch of one device at once, the rest is accumulated; auto: the largest that fits into its memory",
        int,
        least=1,
        optional=True,
        choices=("auto",),
        effect="order",
    ),
    Option(
        "workers", 0, "processes that load data; 0 is fastest for sets in memory", int, least=0, effect="none"
    ),
    Option(
        "compile",
        False,
        "compile the network with torch.compile; auto decides by the device",
        bool,
        choices=("auto",),
        effect="order",
    ),
    Option(
        "validate_every", 500, "optimiser steps between two validation losses", int, least=1, effect="none"
    ),
    Option(
        "budget",
        None,
        "seconds of training, of processor time on a CPU: sets trainer.max_steps from a few steps on this machine",
        float,
        optional=True,
        effect="none",
    ),
    Option(
        "bands",
        "auto",
        "warn if losses or scores leave the reference band of this recipe: auto (if there is one), none, or its name",
        str,
        effect="none",
    ),
    Option(
        "ckpt",
        None,
        "continue a run: last (the newest), a run folder or a checkpoint",
        str,
        optional=True,
        effect="once",
    ),
    Option(
        "init",
        None,
        "start a new run from the weights of a run folder or a checkpoint: step 0, fresh optimiser",
        str,
        optional=True,
        effect="none",  # has acted before a run can be continued
    ),
    Option(
        "init_weights",
        "ema",
        "which weights of init: ema (the average), raw, or with ema=power a length, e.g. 0.07",
        float,
        choices=("ema", "raw"),
        effect="none",
    ),
    Option(
        "init_partial",
        False,
        "start even if parts of the network do not fit those of init; these parts start untrained",
        bool,
        effect="none",
    ),
    Option(
        "allow_changes",
        False,
        "continue even if data, code or experiment have changed since",
        bool,
        effect="once",
    ),
    TRUST,
    WRAPPERS,
    LABELS,
    PER_CLASS,
    Option("runs", "runs", "where run folders are made and `last` is looked for", str, effect="once"),
    Option("name", None, "a name for folders and dashboards", str, optional=True, effect="none"),
    CACHE,
    PROMPTS,
    Option(
        "generation.seed",
        0,
        "of previews and scores, so that runs are compared on the same noise",
        int,
        least=0,
        effect="none",
    ),
    *SWEEP,
)

LOAD = (
    Option("run", "???", "a run folder or a checkpoint file", str),
    Option("checkpoint", "last", "of a run folder: last or best", choices=("last", "best")),
    Option(
        "weights",
        "ema",
        "ema (the average), raw, or with ema=power a length to make from its snapshots, e.g. 0.07",
        float,
        choices=("ema", "raw"),
    ),
    Option("seed", 0, "of the noise", int, least=0),
    Option("batch_size", 256, "images made at once", int, least=1),
    Option("device", "auto", "auto, cpu, cuda, cuda:1, mps", str),
    Option("devices", 1, "processes that share the work, on as many GPUs or on the CPU", int, least=1),
    Option("data.root", None, "where the run's data lie now, if they have moved", str, optional=True),
    Option("data.path", None, "the same for data=huggingface", str, optional=True),
    Option(
        "data.cache",
        None,
        "folder of the data's index and pixels, instead of the default",
        str,
        optional=True,
    ),
    Option("codec.folder", None, "where the run's autoencoder lies now, if it has moved", str, optional=True),
    Option(
        "conditioning.encoder.name",
        None,
        "where the run's text encoder lies now, if it has moved",
        str,
        optional=True,
    ),
    PROMPTS,
    TRUST,
    WRAPPERS,
    *SWEEP,
    LABELS,
)

# How the numbers of images are computed; not of exports.
NUMERICS = (
    Option(
        "precision",
        "32-true",
        "of the network: 32-true; bf16-mixed (autocast); bf16-true (weights in bfloat16, half the memory)",
        choices=("32-true", "bf16-mixed", "bf16-true"),
    ),
    Option("compile", False, "compile the network with torch.compile; pays for many images on a GPU", bool),
    Option(
        "noise",
        "cpu",
        "where noise is drawn: cpu (equal for every device), or device (faster on a GPU, other numbers)",
        choices=("cpu", "device"),
    ),
)

SAMPLE = (
    *LOAD,
    *NUMERICS,
    Option(
        "n", 64, "number of images; image i is the same whatever n, the batch or the device", int, least=1
    ),
    Option("out", None, "where to write; null is a new folder under the run's samples/", str, optional=True),
    Option("runs", "runs", "where the folders of sampling sweeps are made", str),
)

EVALUATE = (
    Option("run", None, "a run folder or a checkpoint file; or images and reference", str, optional=True),
    *LOAD[1:],
    *NUMERICS,
    Option(
        "images",
        None,
        "score given images instead of a run's: a folder, a .zip or an .npz (arr_0: uint8, n x H x W x C)",
        str,
        optional=True,
    ),
    Option(
        "reference",
        None,
        "what images are compared with: a split (test) of the run's data, a data set (digits, digits/test), a folder,"
        " a .zip, an .npz of images, or one with mu and sigma; null is the metric's split of the run's data",
        str,
        optional=True,
    ),
    Option(
        "n",
        None,
        "number of images; null is 10,000 of a run, and all given ones; published FIDs use 50,000",
        int,
        least=1,
        optional=True,
    ),
    Option(
        "bytes",
        "round",
        "how generated values become bytes: round, or truncate as some other codes do",
        choices=("round", "truncate"),
    ),
    PER_CLASS,
    CACHE,
    Option("runs", "runs", "where the folders of evaluation sweeps are made", str),
)

# Options of a guidance or a loss that name its second run.
RUN_OPTIONS = {option.name: option for option in LOAD if option.name in ("run", "checkpoint", "weights")}

EXPORT = (
    *(option for option in LOAD if option.name not in ("batch_size", "devices", "sweep", "rerun_failed")),
    Option("format", "diffusers", "what is written", choices=("diffusers", "torch", "onnx")),
    Option("out", "???", "the folder that is written", str),
)

# Of src.import_weights, besides those of src.train.
IMPORT = (
    Option("source", "???", "a file *.safetensors, or a folder of diffusers", str),
    Option("out", "???", "the run folder that is written", str),
    Option("step", 0, "optimiser steps that the weights were trained for, for records", int, least=0),
    Option(
        "attention_order",
        "legacy",
        "of guided diffusion: new for networks with use_new_attention_order",
        choices=("legacy", "new"),
    ),
    Option("head_channels", 64, "channels of an attention head in OpenAI's networks", int, least=1),
)

OPTIONS: dict[str, tuple[Option, ...]] = {
    "train": TRAIN,
    "sample": SAMPLE,
    "evaluate": EVALUATE,
    "export": EXPORT,
}

HELP = {
    "explain": """\
Which choice of the evaluation accounts for a difference of scores: re-scores one checkpoint along one axis at
a time, on one bank of noise. Without record, it tries the usual alternatives on each axis.
    python -m src.explain run=runs/...
    python -m src.explain run=runs/... record=theirs/scores.json n=2000 metrics=fid
    python -m src.explain run=runs/... axes=[weights,steps,bytes]
record=null    a record of src.evaluate, with the score to explain; its protocol gives the choices that are tried
axes=null      only these axes: weights, guidance, interval, steps, sampler, spacing, clipping, variance, labels,
               precision, bytes, reference, n, seed
All other options are those of src.evaluate, see python -m src.evaluate --help.""",
    "search": """\
The best recipe for one checkpoint, by successive halving on common noise: all combinations are scored with
few images, and only the best go on to more; images are never sampled twice.
    python -m src.search run=runs/...                         the usual values of all of these
    python -m src.search run=runs/... n=2000 weights=0.05,0.1,raw guidance.scale=1,1.5,2 sampler.steps=10,20,50
    python -m src.search run=runs/... guidance=interval 'guidance.interval=[0.2,5],[0.5,3]' sampler=ddim,heun
budget=0.2     largest share of the network evaluations of the full grid; 1 runs the full grid
All other options are those of src.evaluate, with several values, separated by commas, where they are searched.""",
}
"""What `--help` prints for commands whose other options are those of `src.evaluate`."""

# Groups, and options of groups, whose change is not another experiment when a training is resumed.
EFFECTS: dict[str, Effect] = {
    "callbacks": "none",
    "clipping": "none",
    "codec.batch": "order",
    "codec.cache": "once",
    "codec.folder": "none",  # its hash shows whether the autoencoder is another
    "conditioning.encoder.cache": "once",
    "data.cache": "once",
    "guidance": "none",
    "loss.run": "none",  # the loss compares its teacher with that of the checkpoint
    "loss.checkpoint": "none",
    "loss.weights": "none",
    "regularizer.weights": "none",  # the term compares their hash with that of the checkpoint
    "data.path": "none",
    "launcher": "once",
    "hparams_search": "once",
    "ema.device": "none",
    "data.root": "none",  # the fingerprint shows whether the images are others
    "logger": "once",
    "metrics": "none",
    "sampler": "none",
    "spacing": "none",
    "trainer.max_steps": "none",
    "trainer.profiler": "once",
    "optimizer": "tuning",
    "lr_schedule": "tuning",
    "trainer.accelerator": "order",
    "trainer.benchmark": "order",
    "trainer.detect_anomaly": "none",
    "trainer.inference_mode": "none",
    "trainer.limit_val_batches": "none",
    "trainer.log_every_n_steps": "none",
    "trainer.max_time": "none",
    "trainer.deterministic": "order",
    "trainer.devices": "order",
    "trainer.num_nodes": "order",
    "trainer.strategy": "order",
} | {option.name: option.effect for option in TRAIN}


def groups_of(entry_point: str) -> dict[str, tuple[str, str]]:
    """The groups in conf/<entry point>.yaml: name -> default choice and comment."""
    groups = {}
    for line in (CONF / f"{entry_point}.yaml").read_text(encoding="utf-8").splitlines():
        body, _, comment = line.partition("#")
        if match := re.fullmatch(r"  - (?:override )?/?(\w+)(?:@\S+)?: (\S+)\s*", body):
            groups[match[1]] = (match[2], comment.strip())
    return groups


def effect_of(name: str) -> Effect:
    """The effect of a training's option, of a group, or of an option of a group.

    Args:
        name: dotted, e.g. "trainer.devices".
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        effect = EFFECTS.get(".".join(parts[:length]))
        if effect is not None:
            return effect
    return "experiment"


def nested(options: tuple[Option, ...]) -> dict[str, Any]:
    """The options' defaults as nested dictionaries."""
    tree: dict[str, Any] = {}
    for option in options:
        *parents, name = option.name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = option.default
    return tree


def check_options(entry_point: str, config: Any) -> None:
    """Checks the types and ranges of an entry point's single options.

    Raises:
        UserError: one is missing, of another type or out of range.
    """
    from omegaconf import OmegaConf

    from src.app.build import check_value
    from src.errors import UserError

    for option in OPTIONS[entry_point]:
        if OmegaConf.is_missing(config, option.name):
            raise UserError(f"{option.name} is missing: give {option.name}=...")
        value = OmegaConf.select(config, option.name)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value)
        check_value(option.annotation(), value, option.name)


def check_values(options: tuple[Option, ...], given: dict[str, str]) -> dict[str, Any]:
    """The values of options that are not composed by Hydra, read as YAML and checked.

    Args:
        options: the options.
        given: texts of the command line by name.

    Raises:
        UserError: one is missing, of another type or out of range.
    """
    import yaml

    from src.app.build import check_value
    from src.errors import UserError

    values = {}
    for option in options:
        if option.default == "???" and option.name not in given:
            raise UserError(f"{option.name} is missing: give {option.name}=...")
        value = given.get(option.name, option.default)
        if option.kind is not str and option.name in given:
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError:
                raise UserError(
                    f"{option.name}={value}: this is no YAML; quote it, or give a plain value"
                ) from None
        check_value(option.annotation(), value, option.name)
        values[option.name] = value
    return values
