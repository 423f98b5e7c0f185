"""Every file of conf/data builds its source without reading data."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from src.data.source import ImageSource

FILES = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_yaml_builds_its_source(file):
    assert file.read_text().startswith("# ")
    config = OmegaConf.load(file)
    source = instantiate(config)
    assert isinstance(source, ImageSource)
    assert source.name == file.stem
    for key in ("image_size", "channels", "num_classes", "horizontal_flip"):
        assert getattr(source, key) == config[key]
    assert source.image_shape == (config.channels, config.image_size, config.image_size)
