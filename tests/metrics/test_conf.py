from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from src.metrics.features import ClassifierFeatures, InceptionFeatures
from src.metrics.fidelity import FidelityScore

FOLDER = Path(__file__).parents[2] / "conf" / "metrics"
NAMES = {
    "fd_digits": "fd_digits",
    "fd_fashion_mnist": "fd_fashion_mnist",
    "fid": "fid",
    "inception_score": "inception_score",
    "kd_digits": "kd_digits",
    "kid": "kid",
    "precision_recall": "precision_inception",
}


def test_every_choice_is_known_here():
    files = {path.stem: OmegaConf.load(path) for path in FOLDER.glob("*.yaml")}
    scores = {name for name, config in files.items() if config.get("_target_", "").startswith("src.metrics.")}
    assert scores == set(NAMES)


@pytest.mark.parametrize(("choice", "name"), NAMES.items())
def test_choice_instantiates_says_what_it_is_and_is_named_for_its_space(
    choice, name, state_dict_file, monkeypatch
):
    # random weights for those that need InceptionV3
    monkeypatch.setattr("src.metrics.features.find_weights", lambda weights, layer: state_dict_file)
    text = (FOLDER / f"{choice}.yaml").read_text()
    assert text.startswith("# ")
    score = instantiate(OmegaConf.create(text))
    assert isinstance(score, FidelityScore)
    assert score.name == name
    assert isinstance(score.features, ClassifierFeatures) == ("digits" in name or "fashion" in name)
    assert isinstance(score.features, InceptionFeatures) == ("digits" not in name and "fashion" not in name)
    assert score.reference_split == ("train" if score.needs_reference else "none")
    assert all(len(line) <= 120 for line in text.splitlines())
    # moves as a whole, features included
    moved = score.to("meta")
    assert {parameter.device.type for parameter in moved.features.parameters()} == {"meta"}
    assert moved.count.device == torch.device("meta")
