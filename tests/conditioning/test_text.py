"""Texts: the table of encoded captions, and prompts."""

import pytest
import torch

from src.conditioning import ByText, TextEncoder, TextTable


class Letters(TextEncoder):
    """One token for each letter: its place in the alphabet, and its place in the text."""

    width = 2

    def __call__(self, texts):
        states = [[ord(letter) - ord("a"), place] for text in texts for place, letter in enumerate(text)]
        length = torch.tensor([len(text) for text in texts])
        return TextTable(torch.tensor(states, dtype=torch.float16), length.cumsum(0) - length, length, 4)

    def describe(self):
        return "letters"


def test_texts_are_padded_to_one_length_whatever_the_batch():
    table = Letters()(["abc", "", "d", "abcd"])
    found = table.condition([2, 0, 1])
    assert found.tokens.dtype == torch.float16
    assert found.tokens.tolist() == [
        [[3, 0], [0, 0], [0, 0], [0, 0]],
        [[0, 0], [1, 1], [2, 2], [0, 0]],
        [[0, 0], [0, 0], [0, 0], [0, 0]],
    ]
    assert found.mask.sum(dim=1).tolist() == [1, 3, 0]
    assert torch.equal(table.condition(torch.tensor([2])).tokens, found.tokens[:1])
    assert table.condition([]).tokens.shape == (0, 4, 2)


def test_samples_have_the_prompts_in_turn():
    conditioning = ByText(Letters(), prompts=["ab", "c", ""])
    assert conditioning.token_channels == 2
    assert conditioning.texts(range(4)) == ["ab", "c", "", "ab"]
    found = conditioning.of_samples([3, 1, 5], 0)
    assert found.kinds == {"tokens"}
    assert found.mask.sum(dim=1).tolist() == [2, 1, 0]
    assert torch.equal(found.tokens[:1], conditioning.of_samples([0], 0).tokens)
    assert "text i mod 3 of ['ab', 'c', '']" in conditioning.describe_samples()
    assert "letters" in conditioning.describe_samples()


def test_without_prompts_samples_have_the_captions():
    conditioning = ByText(Letters(), captions=lambda: ["a", "b"])
    assert "validation" in conditioning.describe_samples()
    assert conditioning.texts([1, 2]) == ["b", "a"]
    assert conditioning.of_samples([1], 0).tokens[0, 0].tolist() == [1, 0]


def test_no_prompts_and_no_captions():
    with pytest.raises(ValueError, match="prompts is empty"):
        ByText(Letters(), prompts=[])
    with pytest.raises(ValueError, match="no captions"):
        ByText(Letters(), captions=list).of_samples([0], 0)
