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


def labels_of(conditioning, indices, seed=0):
    return conditioning.of_samples(indices, seed).labels.tolist()


@pytest.mark.parametrize(
    ("labels", "expected", "period"),
    [("balanced", [0, 1, 2, 0, 1], 3), ([2, 0, 0, 1], [2, 0, 0, 1, 2], 4), ([1], [1, 1, 1, 1, 1], 1)],
)
def test_classes_of_samples_repeat(labels, expected, period):
    conditioning = ByClass(3).with_labels(labels)
    assert labels_of(conditioning, range(5)) == expected
    assert labels_of(conditioning, [4, 1]) == [expected[4], expected[1]]
    assert conditioning.period == period
    assert labels_of(conditioning, range(5), seed=1) == expected


def test_random_classes_are_uniform_and_depend_only_on_seed_and_index():
    conditioning = ByClass(4).with_labels("random")
    whole = labels_of(conditioning, range(400))
    assert labels_of(conditioning, [7, 399, 3]) == [whole[7], whole[399], whole[3]]
    assert labels_of(conditioning, range(400), seed=1) != whole
    counts = [whole.count(label) for label in range(4)]
    assert sum(counts) == 400
    assert all(abs(count - 100) < 3 * (400 * 3 / 16) ** 0.5 for count in counts)
    assert conditioning.period is None


def test_other_classes_are_those_of_a_copy():
    conditioning = ByClass(3, dropout=0.2)
    other = conditioning.with_labels([2])
    assert conditioning.labels == "balanced"
    assert (other.dropout, other.num_classes) == (0.2, 3)
    assert len({c.describe_samples() for c in (conditioning, other, conditioning.with_labels("random"))}) == 3


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([0, 3], "3: there is no such class"),
        ([-1], "-1: there is no such class"),
        ([], r"\[\]: the list is empty"),
    ],
)
def test_classes_that_do_not_exist_are_refused(labels, named):
    with pytest.raises(ValueError, match=f"^labels={named}; choose balanced, random, or classes, 0 to 2$"):
        ByClass(3).with_labels(labels)


@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "num_classes"), ((3, 1.0), "dropout"), ((3, -0.1), "dropout")]
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message} must be"):
        ByClass(*arguments)
