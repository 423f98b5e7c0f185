"""Conditions of every kind: indexing, moving, dropping."""

import pytest
import torch

from src.conditioning import NO_CLASS, ByClass, Condition


def everything(n=4):
    return Condition(
        labels=torch.arange(n),
        tokens=torch.randn(n, 3, 5),
        mask=torch.tensor([[True, True, False]] * n),
        image=torch.rand(n, 1, 2, 2),
    )


def test_indexing_selects_the_same_images_in_every_field():
    whole = everything()
    picked = whole.index([2, 0])
    assert len(picked) == 2
    for name in ("labels", "tokens", "mask", "image"):
        assert torch.equal(getattr(picked, name), getattr(whole, name)[[2, 0]])
    assert torch.equal(
        Condition.cat([whole.index(slice(0, 1)), whole.index(slice(1, 4))]).tokens, whole.tokens
    )


def test_an_empty_condition_stays_empty():
    empty = Condition()
    assert len(empty) == 0
    assert empty.kinds == frozenset()
    for other in (empty.index([0]), empty.to("cpu"), empty.drop(torch.tensor([True]))):
        assert other.kinds == frozenset()


def test_moving():
    moved = everything().to("meta")
    assert all(part.is_meta for part in (moved.labels, moved.tokens, moved.mask, moved.image))


def test_dropping_removes_every_kind_from_the_chosen_images_only():
    whole, which = everything(), torch.tensor([True, False, False, True])
    dropped = whole.drop(which)
    assert dropped.labels.tolist() == [NO_CLASS, 1, 2, NO_CLASS]
    assert not dropped.mask[which].any()
    assert torch.equal(dropped.mask[~which], whole.mask[~which])
    assert (dropped.image[which] == 0).all()
    assert torch.equal(dropped.image[~which], whole.image[~which])
    # tokens without a mask get one
    assert Condition(tokens=whole.tokens).drop(which).mask.any(dim=1).tolist() == [False, True, True, False]


def test_only_keeps_the_given_kinds():
    whole = everything()
    assert whole.kinds == {"labels", "tokens", "image"}
    assert whole.only(frozenset({"tokens"})).kinds == {"tokens"}
    assert whole.only(frozenset({"tokens"})).mask is not None
    assert ByClass(4).of_data(whole, whole.image).kinds == {"labels"}


def test_samples_cycle_through_the_classes():
    conditioning = ByClass(3)
    assert conditioning.of_samples([0, 4, 5]).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "num_classes"), ((3, 1.0), "dropout"), ((3, -0.1), "dropout")]
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message} must be"):
        ByClass(*arguments)
