"""The table of single options: types are checked, effects on resuming are found by name."""

import pytest
from omegaconf import OmegaConf

from src.app.options import CONF, OPTIONS, check_options, effect_of, groups_of, nested
from src.errors import UserError


@pytest.mark.parametrize(
    ("name", "effect"),
    [
        ("seed", "experiment"),
        ("batch_size", "order"),
        ("ckpt", "once"),
        ("trust", "once"),
        ("cache", "once"),
        ("data.cache", "once"),
        ("logger.wandb.project", "once"),
        ("optimizer.lr", "tuning"),
        ("optimizers", "experiment"),
        ("trainer.devices", "order"),
        ("trainer.max_steps", "none"),
        ("trainer.precision", "experiment"),
        ("data.root", "none"),
        ("data.path", "none"),
        ("data.image_size", "experiment"),
        ("sampler.steps", "none"),
        ("wrappers.mine.factor", "none"),
        ("conditioning.dropout", "experiment"),
    ],
)
def test_effects(name, effect):
    assert effect_of(name) == effect


def test_what_trains_is_an_experiment_and_what_watches_is_not():
    groups = set(groups_of("train")) - {"experiment", "preset", "debug", "speedrun", "trainer"}
    free = {group for group in groups if effect_of(group) in ("none", "once")}
    assert free == {
        "callbacks",
        "clipping",
        "guidance",
        "hparams_search",
        "launcher",
        "logger",
        "metrics",
        "sampler",
        "spacing",
    }


@pytest.mark.parametrize("entry_point", OPTIONS)
def test_defaults_have_the_types_that_they_ask_for(entry_point):
    content = nested(OPTIONS[entry_point])
    content = {name: "a run" if value == "???" else value for name, value in content.items()}
    check_options(entry_point, OmegaConf.create(content))


@pytest.mark.parametrize(
    ("entry_point", "name", "value", "words"),
    [
        ("train", "seed", -1, "greater than or equal to 0"),
        ("train", "batch_size", "many", "integer"),
        ("train", "compile", "sometimes", "boolean"),
        ("train", "trust", "one", "list"),
        ("sample", "weights", "both", "'ema' or 'raw' or a valid number"),
        ("sample", "weights", -0.1, "greater than 0"),
        ("evaluate", "checkpoint", "first", "'last' or 'best'"),
        ("evaluate", "devices", 0, "greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_named(entry_point, name, value, words):
    config = OmegaConf.create({**nested(OPTIONS[entry_point]), "run": "a run", name: value})
    with pytest.raises(UserError, match=f"^{name}=") as error:
        check_options(entry_point, config)
    assert words in str(error.value)


def test_a_missing_run_is_named():
    with pytest.raises(UserError, match=r"^run is missing: give run="):
        check_options("sample", OmegaConf.create(nested(OPTIONS["sample"])))


def test_every_group_has_a_folder_and_a_comment():
    for entry_point in OPTIONS:
        for group, (_, comment) in groups_of(entry_point).items():
            assert (CONF / group).is_dir()
            assert comment
