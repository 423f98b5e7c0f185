"""Networks as programs: which are refused, and for which labels they are compared."""

import math
from types import SimpleNamespace

import pytest
import torch

from src.app.export import labels_of
from src.diffusion.parameterization import EDM as Preconditioned
from src.diffusion.parameterization import Eps
from src.diffusion.schedule import EDM, Cosine, RectifiedFlow
from src.interop import programs
from src.interop.programs import Bare
from tests.model.networks import SMALL, small


@pytest.mark.parametrize("name", SMALL)
def test_a_second_time_is_refused(name):
    with pytest.raises(ValueError, match=r"model\.second_time=true"):
        Bare(small(name, second_time=True))


@pytest.mark.slow
@pytest.mark.parametrize("write", [programs.write_program, programs.write_onnx])
@pytest.mark.parametrize("name", SMALL)
def test_each_network_becomes_a_program_with_the_same_output(name, write, tmp_path):
    pytest.importorskip("onnxruntime")
    assert write(small(name, num_classes=3), (0.0, 1.0), tmp_path) < 1e-4


@pytest.mark.parametrize(
    ("schedule", "parameterization", "labels"),
    [
        (Cosine(400), Eps(), (0, 399)),
        (RectifiedFlow(), Eps(), (0.999, 999)),
        (EDM(), Preconditioned(), (math.log(0.002) / 4, math.log(80) / 4)),
    ],
)
def test_programs_are_compared_for_all_labels(schedule, parameterization, labels, monkeypatch, tmp_path):
    found = labels_of(SimpleNamespace(schedule=schedule, parameterization=parameterization))
    assert found == pytest.approx(labels)
    network = small("adm")
    largest = math.inf

    def program(x, label):
        return Bare(network)(x, label.clamp(max=largest))

    monkeypatch.setattr(programs, "exported", lambda network: None)
    monkeypatch.setattr(torch.export, "save", lambda program, path: None)
    monkeypatch.setattr(torch.export, "load", lambda path: SimpleNamespace(module=lambda: program))
    assert programs.write_program(network, found, tmp_path) == 0
    largest = sum(found) / 2  # a program that is wrong for half of the labels
    assert programs.write_program(network, found, tmp_path) > 1e-4
