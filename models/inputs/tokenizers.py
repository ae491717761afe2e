"""OpenAI's tokenizer for CLIP (github.com/openai/CLIP), on top of open_clip's.

It differs in the names of the special tokens, which in a text stand for the tokens themselves.
"""

import regex
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

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
