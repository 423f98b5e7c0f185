import inspect
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from src.metrics.score import FidelityScore

FOLDER = Path(__file__).parents[2] / "conf" / "metrics"
FILES = {path.stem: OmegaConf.load(path) for path in sorted(FOLDER.glob("*.yaml"))}
WITH_A_TARGET = [name for name, config in FILES.items() if "_target_" in config]
SCORES = [name for name in WITH_A_TARGET if issubclass(get_class(FILES[name]._target_), FidelityScore)]


def test_each_kind_of_score_has_a_choice():
    assert {"fid", "kid", "fd_digits", "precision_recall", "inception_score"} <= set(SCORES)


@pytest.mark.parametrize("choice", SCORES)
def test_choice_builds_a_score_with_its_name_that_moves_to_a_device(choice, state_dict_file, monkeypatch):
    # random weights for InceptionV3
    monkeypatch.setattr("src.metrics.features.find_weights", lambda weights, layer: state_dict_file)
    score = instantiate(FILES[choice])
    names = {"precision_recall": "precision_inception"}
    assert score.name == names.get(choice, choice.replace("precision_recall", "precision"))
    assert score.reference_split == ("train" if score.needs_reference else "none")
    moved = score.to("meta")
    assert {parameter.device.type for parameter in moved.features.parameters()} == {"meta"}
    assert moved.count.device == torch.device("meta")


@pytest.mark.parametrize("choice", WITH_A_TARGET)
def test_values_equal_the_defaults_of_the_constructor(choice):
    config = FILES[choice]
    parameters = inspect.signature(get_class(config._target_)).parameters
    for name, value in config.items():
        if name in ("_target_", "features"):
            continue
        default = parameters[name].default
        assert default in (value, inspect.Parameter.empty), name
