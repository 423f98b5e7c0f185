import inspect
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import nn

from src.metrics import pretrained
from src.metrics.score import FidelityScore

FOLDER = Path(__file__).parents[2] / "conf" / "metrics"
FILES = {path.stem: OmegaConf.load(path) for path in sorted(FOLDER.glob("*.yaml"))}
WITH_A_TARGET = [name for name, config in FILES.items() if "_target_" in config]
SCORES = [name for name in WITH_A_TARGET if issubclass(get_class(FILES[name]._target_), FidelityScore)]


def test_each_kind_of_score_has_a_choice():
    needed = {"fid", "kid", "fd_digits", "precision_recall", "inception_score"}
    assert needed | {"fd_dinov2", "fd_clip", "fid_infinity", "density_coverage"} <= set(SCORES)


@pytest.mark.parametrize("choice", SCORES)
def test_choice_builds_a_score_with_its_name_that_moves_to_a_device(choice, state_dict_file, monkeypatch):
    # random weights for InceptionV3; tests/metrics/test_pretrained.py has DINOv2 and CLIP
    monkeypatch.setattr("src.metrics.features.find_weights", lambda weights, layer: state_dict_file)
    if choice in ("fd_dinov2", "fd_clip"):
        name = choice.removeprefix("fd_")
        plain = nn.Linear(3, 2)
        plain.forward = lambda images: (images.float().mean(dim=(2, 3)) @ plain.weight.T,)
        kind = {"dinov2": "DinoFeatures", "clip": "ClipFeatures"}[name]
        made = pretrained.PretrainedFeatures(name, plain, "a test", 8)
        monkeypatch.setattr(pretrained, kind, lambda network, weights: made)
    score = instantiate(FILES[choice])
    names = {"precision_recall": "precision_inception", "density_coverage": "density_inception"}
    short = choice.replace("precision_recall", "precision").replace("density_coverage", "density")
    assert score.name == names.get(choice, short)
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
