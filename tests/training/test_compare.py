"""What a resume compares."""

from src.training.resume import compare

ORIGIN = {
    "data": "a",
    "code": {"format": 1, "modules": {}},
    "machine": {},
    "world_size": 1,
    "accumulation": 1,
}


def level(coupling: str, accumulation: int, **options: str) -> str:
    config = {"coupling._target_": f"src.training.coupling.{coupling}"}
    config |= {f"{group}._target_": target for group, target in options.items()}
    then = ORIGIN | {"config": config}
    now = ORIGIN | {"config": config, "accumulation": accumulation, "deterministic": True}
    return compare(then, now, lambda option: "experiment").level


def test_another_micro_batch_changes_a_coupling_and_rounds_otherwise():
    assert level("OptimalTransport", 1) == level("Independent", 1) == "bit-exact"
    assert level("Independent", 2) == "order-exact"
    assert level("OptimalTransport", 2) == "approximate"
    assert level("Independent", 2, regularizer="src.training.regularizer.Dispersive") == "approximate"
    assert level("Independent", 2, loss="src.diffusion.loss.ContrastiveLoss") == "approximate"
    assert level("Independent", 2, loss="src.diffusion.loss.DenoisingLoss") == "order-exact"
