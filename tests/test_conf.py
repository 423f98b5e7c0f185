"""Every file of conf/ composes and builds its object; every experiment trains."""

import inspect
import math
import re
from functools import partial
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from src.app import jobs
from src.app.assemble import Experiment, assemble
from src.app.build import build
from src.app.cli import help_text
from src.app.conditions import conditioning_of
from src.app.options import CONF, ENTRY_POINTS, OPTIONS
from src.app.parts import codec_of, scores_of, source_of
from src.app.sample import task_of
from src.errors import UserError
from src.generation.recipe import Recipe
from src.generation.tasks import Task
from src.metrics.score import FidelityScore
from tests.conftest import ROOT
from tests.tiny_encoder import replace_font_and_encoder

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
FILES = sorted(CONF.rglob("*.yaml"))
# These groups override other groups and describe no object.
PRESETS = {"experiment", "debug", "preset", "speedrun"}

# Overrides for choices that are invalid with the defaults.
NEEDS = {
    "schedule=jsd": ["parameterization=v"],
    "schedule=rectified_flow": ["parameterization=velocity"],
    "schedule=zero_terminal_snr": ["parameterization=v"],
    "conditioning=text": ["data=emoji"],
    "data=image_folder": ["data.root=${oc.env:PICTURES}"],
    "data=huggingface": ["data.path=${oc.env:PICTURES}"],
    "optimizer=schedule_free": ["ema=schedule_free"],
    "ema=schedule_free": ["optimizer=schedule_free"],
    "loss=hybrid": ["variance=learned_range"],
    "loss=vlb": ["variance=learned"],
    **{
        choice: [
            "schedule=rectified_flow",
            "parameterization=velocity",
            "model.second_time=true",
            "clipping=none",
            *(["loss=mean_flow"] if choice.startswith("sampler") else []),
        ]
        for choice in (
            "loss=mean_flow",
            "loss=continuous_consistency",
            "loss=shortcut",
            "loss=consistency",
            "sampler=flow_map",
        )
    },
    "loss=contrastive": ["conditioning=class"],
    "coupling=optimal_transport_per_class": ["conditioning=class"],
    "trainer=fsdp": ["callbacks=none", "trainer.accelerator=cpu"],
    "loss=classification": ["conditioning=class", "model=encoder_tiny"],
    "model=encoder_tiny": ["conditioning=class", "loss=classification"],
    "loss=reconstruction": ["model=autoencoder_kl"],
    "model=autoencoder_kl": ["loss=reconstruction"],
    "variance=learned": ["loss=hybrid"],
    "variance=learned_range": ["loss=hybrid"],
    "guidance": ["conditioning=class", "conditioning.dropout=0.1"],
    "model=unet_ddpm": ["data=cifar10"],
    "model=unet_small": ["data=fashion_mnist"],
    # the published sizes are tested without memory, in tests/model
    "model=unet_adm": ["model.base_channels=64"],
    "model=unet_adm_256": ["data=cifar10", "model.base_channels=32"],
    "model=unet_ddpmpp": ["model.base_channels=32"],
    "model=unet_edm2": ["model.base_channels=64", "model.blocks_per_level=1"],
    **{f"model=dit_{size}": ["model.depth=1"] for size in ("s", "b", "l", "xl")},
    **{
        f"model=jit_{size}": ["data=cifar10", "model.depth=11", "model.width=192"] for size in ("b", "l", "h")
    },
}
# Network sizes that train on 8x8 digits in seconds, by the class of the network.
SMALL_NETWORK = {
    "UNet": [
        "model.base_channels=8",
        "model.groups=4",
        "model.channel_multipliers=[1,1]",
        "model.blocks_per_level=1",
        "model.attention_factors=[2]",
    ],
    "DiT": ["model.width=16", "model.depth=2", "model.heads=2"],
}
SMALL_NETWORK["ResamplingUNet"] = SMALL_NETWORK["UNet"]
SMALL_NETWORK["EDM2"] = [
    *(option for option in SMALL_NETWORK["UNet"] if "groups" not in option),
    "model.head_channels=8",
]


def needs(group: str, choice: str) -> list[str]:
    """What else to choose beside a choice: for it, or for its whole group."""
    return NEEDS.get(f"{group}={choice}", NEEDS.get(group, []))


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups_of(entry_point: str) -> list[str]:
    """The groups in an entry point's defaults list."""
    defaults = OmegaConf.load(CONF / f"{entry_point}.yaml").defaults
    choices = [entry for entry in defaults if not isinstance(entry, str)]
    return [key for entry in choices for key in entry if not key.startswith("override ")]


def composed(entry_point: str, *overrides: str) -> DictConfig:
    """An entry point's configuration with these overrides, as the command line composes it."""
    jobs.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(entry_point, list(overrides))


@pytest.fixture
def assembled(tmp_path, monkeypatch):
    """assembled("schedule=linear", ...) -> the assembled training with these overrides, on digits and the CPU."""
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    monkeypatch.setenv("PICTURES", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    replace_font_and_encoder(monkeypatch)

    def make(*overrides: str) -> tuple[Experiment, DictConfig]:
        # scores are slow: build them only for tests that choose one
        plain = ["logger=csv", "trainer=cpu", "metrics=none"]
        given = {override.split("=")[0] for override in overrides}
        plain = [override for override in plain if override.split("=")[0] not in given]
        config = composed("train", *plain, *overrides)
        return assemble(config, tmp_path / "run"), config

    return make


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_first_line_describes_the_file(path):
    lines = path.read_text().splitlines()
    package = [line for line in lines if "@package" in line]
    assert package == lines[:1] if path.parent.name in PRESETS else not package
    first = next(line for line in lines if line not in package)
    assert re.fullmatch(r"# \S.{5,}", first)


@pytest.mark.parametrize("group", sorted(set(GROUPS) - PRESETS))
def test_leaf_is_one_class_and_its_options(group):
    """A file has only `defaults`, `_target_` and options of the class; `callbacks` and `logger` map names to these."""
    collects = group in {"callbacks", "logger"}
    for name in choices(group):
        loaded = OmegaConf.load(CONF / group / f"{name}.yaml")
        node = OmegaConf.to_container(loaded, resolve=False) or {}
        leaves = {key: value for key, value in node.items() if key != "defaults"}
        for leaf in leaves.values() if collects else [leaves] if leaves and "defaults" not in node else []:
            assert "_target_" in leaf, f"{group}/{name}"
            assert inspect.isclass(get_class(leaf["_target_"]))


@pytest.mark.parametrize(
    "group",
    [
        "schedule",
        "parameterization",
        "variance",
        "loss",
        "weighting",
        "distance",
        "time_sampling",
        "regularizer",
        "augmentation",
        "spacing",
        "clipping",
        "restoration",
    ],
)
def test_values_equal_the_defaults_of_the_class(group):
    """The reference tests check these defaults against the papers. Interpolated values are skipped."""
    # the tests of the presets check the `end` of these against the papers
    ends = {"uniform_time_vp", "uniform_log_snr_vp"}
    for name in set(choices(group)) - ends:
        loaded = OmegaConf.load(CONF / group / f"{name}.yaml")
        node = OmegaConf.to_container(loaded, resolve=False) or {}
        if node:
            parameters = inspect.signature(get_class(node["_target_"]).__init__).parameters
            for option, value in node.items():
                default = parameters[option].default if option in parameters else inspect.Parameter.empty
                if default is not inspect.Parameter.empty and "${" not in str(value):
                    assert value == default, f"{group}/{name}: {option}"


# Values from the papers or, where a paper gives none, from its authors' configurations.
PAPERS = {
    "ddpm_cifar10": {
        "schedule": "Linear",
        "schedule.T": 1000,
        "parameterization": "Eps",
        "variance": "Large",
        "model.dropout": 0.1,
        "batch_size": 128,
        "optimizer.lr": 2e-4,
        "lr_schedule.warmup_steps": 5000,
        "ema.decay": 0.9999,
        "trainer.gradient_clip_val": 1.0,
        "trainer.max_steps": 800_000,
        "sampler.steps": 1000,
    },
    "edm_cifar10": {
        "schedule": "EDM",
        "parameterization": "EDM",
        "weighting": "EDM",
        "time_sampling.mean": -1.2,
        "time_sampling.std": 1.2,
        "model": "ResamplingUNet",
        "model.blocks_per_level": 4,
        "model.dropout": 0.13,
        "batch_size": 512,
        "optimizer.lr": 1e-3,
        "lr_schedule.warmup_steps": 10_000_000 // 512,
        "ema.half_life": 500_000,
        "trainer.max_steps": 200_000_000 // 512,
        "sampler": "Heun",
        "sampler.steps": 18,
        "spacing.rho": 7,
    },
    "edm2_cifar10": {
        "schedule": "EDM",
        "parameterization": "EDM",
        "weighting": "LearnedUncertainty",
        "time_sampling.mean": -1.2,
        "model": "EDM2",
        "optimizer.lr": 1e-2,
        "optimizer.betas": [0.9, 0.99],
        "lr_schedule": "InverseSquareRoot",
        "ema": "PowerEMA",
        "trainer.max_steps": 200_000_000 // 512,
        "sampler.steps": 18,
    },
    "improved_ddpm_cifar10": {
        "schedule": "Cosine",
        "schedule.T": 4000,
        "schedule.s": 0.008,
        "parameterization": "Eps",
        "variance": "LearnedRange",
        "loss": "HybridLoss",
        "loss.vlb_weight": 0.001,
        "model.blocks_per_level": 3,
        "model.dropout": 0.3,
        "batch_size": 128,
        "optimizer.lr": 1e-4,
        "ema.decay": 0.9999,
        "trainer.max_steps": 500_000,
    },
    "min_snr_v_cifar10": {
        "schedule": "Cosine",
        "parameterization": "V",
        "weighting": "MinSNR",
        "weighting.gamma": 5,
        "batch_size": 128,
        "optimizer.lr": 2e-4,
        "ema.decay": 0.9999,
        "trainer.max_steps": 800_000,
    },
    "mean_flow_cifar10": {
        "schedule": "RectifiedFlow",
        "parameterization": "Velocity",
        "loss": "MeanFlowLoss",
        "loss.share": 0.75,
        "loss.power": 0.75,
        "time_sampling.mean": -2,
        "time_sampling.std": 2,
        "model": "ResamplingUNet",
        "model.dropout": 0.2,
        "batch_size": 1024,
        "optimizer.lr": 6e-4,
        "lr_schedule.warmup_steps": 200 * 50_000 // 1024 + 1,
        "ema.decay": 0.99995,
        "trainer.max_steps": 800_000,
        "sampler.steps": 1,
    },
    "rectified_flow_cifar10": {
        "schedule": "RectifiedFlow",
        "schedule.t_min": 1e-3,
        "parameterization": "Velocity",
        "model.dropout": 0.15,
        "batch_size": 128,
        "optimizer.lr": 2e-4,
        "lr_schedule.warmup_steps": 5000,
        "ema.decay": 0.999999,
        "trainer.gradient_clip_val": 1.0,
        "trainer.max_steps": 1_300_000,
    },
    "vp_sde_cifar10": {
        "schedule": "VP",
        "schedule.beta_min": 0.1,
        "schedule.beta_max": 20,
        "schedule.t_min": 1e-5,
        "parameterization": "Eps",
        "batch_size": 128,
        "optimizer.lr": 2e-4,
        "lr_schedule.warmup_steps": 5000,
        "ema.decay": 0.9999,
        "trainer.gradient_clip_val": 1.0,
        "trainer.max_steps": 1_300_000,
        "sampler.steps": 1000,
    },
}


def test_every_paper_experiment_has_expected_values():
    assert set(PAPERS) == {name for name in choices("experiment") if name.endswith("_cifar10")}


@pytest.mark.parametrize("name", PAPERS)
def test_experiment_has_the_values_of_its_paper(name):
    config = composed("train", f"experiment={name}")
    found = {option: OmegaConf.select(config, option) for option in PAPERS[name]}
    for option, value in found.items():
        if isinstance(value, DictConfig):  # for a group, compare the class
            found[option] = value._target_.rpartition(".")[2]
    assert found == PAPERS[name]


def test_group_has_the_name_of_its_module():
    written = {path.stem for path in (ROOT / "src").rglob("*.py")} | {
        path.name for path in (ROOT / "src").rglob("*") if path.is_dir()
    }
    elsewhere = {"trainer", "logger", "optimizer"}  # classes of Lightning and torch
    assert {group.removesuffix("s") for group in set(GROUPS) - PRESETS - elsewhere} <= {
        name.removesuffix("s") for name in written
    }


def test_every_group_belongs_to_an_entry_point():
    assert {group for name in ENTRY_POINTS for group in groups_of(name)} == set(GROUPS)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_help_lists_every_group_choice_and_option(entry_point):
    lines = help_text(entry_point).splitlines()
    for group in groups_of(entry_point):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{group}="))
        listed = [line.split() for line in lines[start + 1 : start + 1 + len(choices(group))]]
        assert [words[0] for words in listed] == choices(group)
        assert all(len(words) > 1 for words in listed)  # the name and its description
    for option in OPTIONS[entry_point]:
        assert any(line.strip().startswith(f"{option.name}=") for line in lines), option
        assert len(option.help) > 5


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_options_table_equals_the_composed_configuration(entry_point):
    config = composed(entry_point)
    named = {option.name.partition(".")[0] for option in OPTIONS[entry_point]}
    assert {str(key) for key in config} - set(groups_of(entry_point)) == named
    for option in OPTIONS[entry_point]:
        raw = OmegaConf.to_container(config, resolve=False)
        for part in option.name.split("."):
            raw = raw[part]
        assert raw == option.default


# built in separate tests
ELSEWHERE = {"metrics", "callbacks", "logger", *PRESETS, "launcher", "hparams_search"}


def reachable(root: object) -> list[object]:
    """All objects reachable from `root` through containers, partials and attributes of src and Lightning objects."""
    found, pending, seen = [], [root], set()
    while pending:
        one = pending.pop()
        if id(one) in seen or isinstance(one, torch.Tensor | str | int | float | type(None)):
            continue
        seen.add(id(one))
        found.append(one)
        if isinstance(one, partial):
            pending += [one.func, *one.keywords.values()]
        elif isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, list | tuple):
            pending += one
        elif type(one).__module__.startswith(("src.", "lightning.")):
            pending += vars(one).values()
    return found


@pytest.mark.parametrize(
    ("group", "choice"),
    [(group, choice) for group in groups_of("train") if group not in ELSEWHERE for choice in choices(group)],
)
def test_choice_builds_its_object(group, choice, assembled):
    override = f"{group}={choice}"
    if group == "trainer" and choice == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if OmegaConf.is_missing(OmegaConf.load(CONF / group / f"{choice}.yaml"), "run"):
        pytest.skip("needs a second run: tests/cli/test_guidance.py")
    if override == "regularizer=repa":
        pytest.skip("needs an encoder: tests/training/test_repa.py")
    if override == "codec=autoencoder_kl":
        pytest.skip("needs an autoencoder: tests/data/test_autoencoder.py")
    parts, config = assembled(override, *needs(group, choice))
    node = config[group]
    if not node:
        return  # the choice is empty; the tests below train with it
    target = get_class(node["_target_"])
    found = [one for one in reachable(parts) if one is target or type(one) is target]
    made = (
        next(one for one in reachable(parts) if isinstance(one, partial) and one.func is target)
        if (target in found)
        else found[0]
    )
    numbers = made.keywords if isinstance(made, partial) else vars(made)
    for name, value in node.items():
        if name in numbers and not name.startswith("_") and isinstance(value, int | float | bool):
            assert numbers[name] == value, name


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        (group, choice)
        for group in ("schedule", "parameterization", "variance", "loss", "weighting", "time_sampling")
        for choice in choices(group)
    ],
)
def test_diffusion_choice_trains(group, choice, assembled):
    """Takes two steps as the command line does, each followed by a validation."""
    if OmegaConf.is_missing(OmegaConf.load(CONF / group / f"{choice}.yaml"), "run"):
        pytest.skip("needs a second run: tests/training/test_few_step.py")
    overrides = [
        "batch_size=8",
        "trainer.max_steps=2",
        "validate_every=1",
        "callbacks=none",
        "schedule=cosine",
    ]
    overrides = [*SMALL_NETWORK["UNet"], *overrides, f"{group}={choice}", *needs(group, choice)]
    parts, _ = assembled(*overrides, "+trainer.limit_val_batches=1")
    weights = parts.module.denoiser.network.state_dict()
    before = {name: weight.clone() for name, weight in weights.items()}
    parts.trainer.fit(parts.module, parts.data)
    assert parts.trainer.global_step == 2
    assert parts.module.gradient_norm.isfinite()
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any((weight != before[name]).any() for name, weight in weights.items())
    assert 0 <= parts.scores()["val/loss"] < math.inf


def test_sizes_of_the_network_follow_the_data(assembled):
    parts, _ = assembled("data=fashion_mnist", "model=unet_small")
    assert parts.module.denoiser.network.image_shape == (1, 28, 28)


@pytest.mark.parametrize("choice", choices("callbacks"))
def test_callbacks(choice, assembled):
    parts, config = assembled(f"callbacks={choice}", "metrics=fd_digits")
    wanted = {get_class(node["_target_"]) for node in config.callbacks.values()}
    assert wanted
    assert wanted <= {type(callback) for callback in parts.trainer.callbacks}


@pytest.mark.parametrize("choice", choices("logger"))
def test_loggers(choice, assembled):
    parts, config = assembled(f"logger={choice}")
    wanted = {get_class(node["_target_"]) for node in (config.logger or {}).values()}
    made = {type(logger) for logger in parts.trainer.loggers}
    assert wanted <= made
    (always,) = made - wanted
    assert issubclass(always, CSVLogger)


@pytest.mark.parametrize("choice", choices("metrics"))
def test_metrics(choice, monkeypatch, tmp_path):
    """Builds the score, or raises a one-line error if weights are missing and cannot be downloaded."""

    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("src.metrics.inception.POOL3_FILE", tmp_path / "pool3.safetensors")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setattr("torch.hub.load", unreachable)
    data = choice if choice in choices("data") else "fashion_mnist" if "fashion" in choice else "digits"
    config = composed(
        "train",
        f"data={data}",
        f"metrics={choice}",
        *(["conditioning=class"] if choice.startswith("accuracy") else []),
    )
    source = source_of(config)
    codec = codec_of(config, source)
    conditioning = conditioning_of(config, source, codec)
    recipe = Recipe(None, None, 1, (), codec, conditioning, seed=0)
    of_images = config.metrics and issubclass(get_class(config.metrics["_target_"]), FidelityScore)
    if of_images and "Inception" in OmegaConf.to_yaml(config.metrics):
        with pytest.raises(
            UserError, match=r"^metrics\.features\.weights: no InceptionV3 weights in \S+"
        ) as raised:
            scores_of(config, recipe, False)
        assert "\n" not in str(raised.value)
        fix = "fetch http" if choice == "inception_score" else "run `make inception`, or choose"
        assert fix in str(raised.value)
    elif "pretrained" in OmegaConf.to_yaml(config.metrics):
        with pytest.raises(
            UserError, match=r"^metrics\.features\.weights: .* give metrics\.features\.weights="
        ):
            scores_of(config, recipe, False)
    elif not config.metrics:
        assert scores_of(config, recipe, False) is None
    elif not issubclass(get_class(config.metrics["_target_"]), FidelityScore):
        # only for src.evaluate: these generate no images, so training cannot track them
        if "Inception" not in OmegaConf.to_yaml(config.metrics):
            assert build(config.metrics, object, "metrics") is not None
        with pytest.raises(UserError, match=r"^metrics"):
            scores_of(config, recipe, False)
    else:
        assert type(scores_of(config, recipe, False).monitored) is get_class(config.metrics["_target_"])


def test_the_default_score_fits_the_data():
    for data in choices("data"):
        (name,) = OmegaConf.load(CONF / "metrics" / f"{data}.yaml").defaults
        assert composed("train", f"data={data}").metrics == OmegaConf.load(CONF / "metrics" / f"{name}.yaml")


def test_jit_on_imagenet_fits_together(assembled, monkeypatch):
    monkeypatch.setattr("src.data.image_folder.ImageFolder.check", lambda self: None)  # 1,000 folders
    experiment, _ = assembled(
        "experiment=jit_imagenet256", "data.root=${oc.env:PICTURES}", "data.image_size=64", "model.width=192"
    )
    assert experiment.module.denoiser.network.image_shape == (3, 64, 64)


@pytest.mark.slow
def test_every_row_of_the_speed_run_fits_together_and_differs_from_the_baseline(assembled):
    seen = {}
    for row in choices("speedrun"):
        _, config = assembled(f"speedrun={row}", "metrics=fd_fashion_mnist")
        assert config.budget
        # the same protocol, and as many evaluations
        assert (config.sampler._target_, config.sampler.steps) == ("src.diffusion.sampler.DDIM", 20)
        assert config.callbacks.track_fidelity.n == 1000
        text = OmegaConf.to_yaml(config)
        assert text not in seen, f"{row} is {seen[text]}"
        seen[text] = row


def test_overrides_take_precedence_over_the_experiment():
    config = composed("train", "experiment=edm_digits", "preset=ddim_paper_cifar10", "debug=quick")
    assert config.schedule._target_.endswith(".EDM")
    assert config.sampler._target_.endswith(".DDIM")
    assert config.spacing._target_.endswith(".Quadratic")
    assert (config.trainer.max_steps, config.sampler.steps) == (20, 5)


@pytest.mark.parametrize("entry_point", ["sample", "evaluate"])
def test_sampling_and_scoring_share_the_choices_of_training(entry_point):
    groups = set(groups_of(entry_point)) - PRESETS - {"task", "restoration"}
    assert groups <= set(groups_of("train"))
    config, training = composed(entry_point), composed("train")
    for group in groups:
        # an empty group keeps the run's own choice; otherwise it is the choice that training uses for previews
        assert not config.get(group) or config[group]["_target_"] == training[group]["_target_"]


@pytest.mark.parametrize("choice", choices("task"))
def test_tasks(choice):
    config = composed("sample", f"task={choice}")
    assert type(build(config.task, Task, "task")) is get_class(config.task["_target_"])


@pytest.mark.parametrize("choice", choices("restoration"))
def test_restorations(choice):
    config = composed("sample", f"restoration={choice}", "task=inpaint")
    assert task_of(config).restoration.func is get_class(config.restoration._target_)
    with pytest.raises(UserError, match=r"^restoration has no effect on Draw"):
        task_of(composed("sample", f"restoration={choice}"))


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in ("experiment", "debug") for choice in choices(group)]
)
def test_two_steps(group, choice, command, only_run, tmp_path, monkeypatch):
    """Every experiment and debug preset trains, previews and saves: on 8x8 images, with a small network."""
    if choice in ("dit_imagenet256", "latent_digits"):
        pytest.skip("needs an autoencoder: tests/data/test_autoencoder.py")
    if choice == "jit_imagenet256":
        pytest.skip("patches of 16x16 pixels: test_jit_on_imagenet_fits_together")
    replace_font_and_encoder(monkeypatch)
    network = composed("train", f"{group}={choice}").model._target_.rpartition(".")[2]
    status = command(
        "train",
        f"{group}={choice}",
        *(["data=emoji", "data.image_size=8"] if choice == "text_emoji" else ["data=digits"]),
        # shorter than the training
        *(["lr_schedule.warmup_steps=1"] if choice in ("fast_digits", "dit_digits") else []),
        *SMALL_NETWORK.get(network, SMALL_NETWORK["UNet"]),
        "batch_size=8",
        "trainer.max_steps=2",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "validate_every=2",
        "sampler.steps=2",
        "callbacks.curves.every=1",
        "callbacks.sample_images.n=2",
        "callbacks.track_fidelity.n=2",
        "callbacks.track_fidelity.batch_size=2",
        "logger=csv",
    )
    assert status == 0
    run: Path = only_run()
    assert (run / "checkpoints" / "step_00000002.ckpt").is_file()
    classifies = "classification" in OmegaConf.load(run / "config.yaml").loss._target_.lower()
    assert (run / "samples" / "step_00000002.png").is_file() != classifies
    curves = (run / "csv").rglob("metrics.csv")
    names, *rows = next(iter(curves)).read_text().splitlines()
    column = names.split(",").index("train/loss")
    losses = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
