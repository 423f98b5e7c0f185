"""Randomly initialised text encoders of a few thousand weights."""

from pathlib import Path

import pytest
import torch

from src.conditioning import TextTable
from src.data.emoji import Emoji
from src.data.text_encoder import Pretrained

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*DIGITS, "the", "digit", "a", "red", "heart", "cat", "face")


def save_encoder(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """Saves a text encoder with a tokenizer of `WORDS`; skips the test where transformers is not installed."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    places = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(places, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    )
    fast.save_pretrained(folder)
    size = {"vocab_size": len(places), "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(seed)
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=16, intermediate_size=16, max_position_embeddings=16, **size
        )
        model = transformers.BertModel(config)
    elif kind == "t5":
        config = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(places)
        )
        model = transformers.T5Model(config)
    else:
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "max_position_embeddings": 16,
            "eos_token_id": 3,
            **size,
        }
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 8, "patch_size": 8}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    return folder


def replace_font_and_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random 8x8 emoji, and one random token for each text, for tests of the configuration."""
    names = [chr(0x1F400 + i) for i in range(200)]

    def encode(self, texts):
        n = len(texts)
        return TextTable(
            torch.randn(n, 8), torch.arange(n), torch.ones(n, dtype=torch.int64), self.max_length
        )

    pixels = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(Emoji, "check", lambda self: None)
    monkeypatch.setattr(Emoji, "_pictures", (names, [f"emoji {i}" for i in range(200)], pixels))
    monkeypatch.setattr(Pretrained, "width", 8)
    monkeypatch.setattr(Pretrained, "digest", "0" * 64)
    monkeypatch.setattr(Pretrained, "__call__", encode)
