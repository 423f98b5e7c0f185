"""What a resume compares."""

from types import SimpleNamespace

import pytest

from src.diffusion.loss import ContrastiveLoss, DenoisingLoss
from src.training.coupling import Coupling, Independent, OptimalTransport
from src.training.regularizer import Dispersive
from src.training.repa import REPA
from src.training.resume import compare, part_with_pairs

ORIGIN = {
    "data": "a",
    "code": {"format": 1, "modules": {}},
    "machine": {},
    "world_size": 1,
    "accumulation": 1,
    "config": {},
}


class Own(Coupling):
    """Not of this project; nothing is known of what it does."""

    def __call__(self, x0, eps, condition):
        return eps


@pytest.mark.parametrize(
    ("part", "chosen", "level"),
    [
        ("coupling", Independent, "order-exact"),
        ("coupling", OptimalTransport, "approximate"),
        ("coupling", Own, "approximate"),
        ("regularizer", Dispersive, "approximate"),
        ("regularizer", REPA, "order-exact"),
        ("loss", ContrastiveLoss, "approximate"),
        ("loss", DenoisingLoss, "order-exact"),
    ],
)
def test_another_micro_batch_changes_what_compares_images_and_rounds_otherwise(part, chosen, level):
    module = SimpleNamespace(**{part: chosen.__new__(chosen)})
    now = {"paired": part_with_pairs(module), "deterministic": True}
    same = compare(ORIGIN, ORIGIN | now, lambda option: "experiment")
    assert same.level == "bit-exact"
    other = compare(ORIGIN, ORIGIN | now | {"accumulation": 2}, lambda option: "experiment")
    assert other.level == level
    assert any(part in each for each in other.experiment) == (level == "approximate")
