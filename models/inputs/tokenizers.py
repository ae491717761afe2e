"""Tokenizers of two-tower models.

OpenAI's for CLIP (github.com/openai/CLIP) differs from open_clip's in the names of the special
tokens, which in a text stand for the tokens themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from models.errors import InputError

START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class OpenAITokenizer(SimpleTokenizer):  # type: ignore[misc]
    """Texts to int64 ids (N, context_length): start, the text's first tokens, end, zeros."""

    def __init__(self, context_length: int = 77) -> None:
        super().__init__(context_length=context_length)
        self.encoder |= {START: self.sot_token_id, END: self.eot_token_id}
        self.cache |= {START: START, END: END}
        special = "|".join(map(regex.escape, (START, END)))
        self.pat = regex.compile(f"{special}|{_WORDS}", regex.IGNORECASE)


class CuttingTokenizer(OpenAITokenizer):
    """As `OpenAITokenizer`, but a text that is too long loses its end token, as in SLIP's and
    A-CLIP's code."""

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.context_length
        result = torch.zeros(1 if isinstance(texts, str) else len(texts), length).long()
        for row, text in zip(result, [texts] if isinstance(texts, str) else texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text), self.eot_token_id][:length]
            row[: len(ids)] = torch.tensor(ids)
        return result


class MissingTokenizer:
    """Stands for a tokenizer that is not beside its model's file: texts are refused."""

    def __init__(self, source: str, context_length: int) -> None:
        self.source = source
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Tensor:
        raise InputError(
            f"this model takes token ids alone: its tokenizer, {self.source}, is not here. Put its "
            "tokenizer.json and tokenizer_config.json beside the checkpoint",
            field="texts",
        )


def create_tokenizer(
    name: str,
    context_length: int,
    *,
    source: str | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    folder: str = "",
) -> Any:
    """The tokenizer of a two-tower checkpoint: texts to int64 ids (N, context_length).

    Args:
        name: `openai`, `cutting`, `open_clip`, or `hub` for one of transformers'.
        source: the hub's name of it.
        mode: `tokenizer_mode` of open_clip's configuration.
        options: `tokenizer_kwargs` of open_clip's configuration.
        folder: where the files of a tokenizer of the hub lie.
    """
    if name == "hub":
        files = ("tokenizer.json", "tokenizer_config.json")
        if not all((Path(folder) / file).is_file() for file in files):
            return MissingTokenizer(str(source), context_length)
        return HFTokenizer(folder, context_length, tokenizer_mode=mode, **(options or {}))
    if name == "open_clip":
        return SimpleTokenizer(context_length=context_length, **(options or {}))
    return {"openai": OpenAITokenizer, "cutting": CuttingTokenizer}[name](context_length)
