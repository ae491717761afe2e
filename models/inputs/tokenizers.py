"""Tokenizers of two-tower models.

OpenAI's for CLIP (github.com/openai/CLIP) differs from open_clip's in the names of the special
tokens, which in a text stand for the tokens themselves.
"""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from models.errors import CheckpointError, InputError

START, END = "<|startoftext|>", "<|endoftext|>"
# The files beside a checkpoint that tokenizers are read from.
OWN_FILE = ("tokenizer.json",)
BOTH_FILES = ("tokenizer.json", "tokenizer_config.json")
FILES = {
    "hub": BOTH_FILES,
    "sticky-eos": OWN_FILE,
    "leading-cls": OWN_FILE,
    "siglip": BOTH_FILES,
    "siglip-2": BOTH_FILES,
}
_WITHOUT_PUNCTUATION = str.maketrans("\u2581", " ", string.punctuation)
# Names that T5's vocabularies end with, which models need not have words for.
_EXTRA = regex.compile(r"\u2581?<extra_id_\d+>")
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


def bound_words(tokenizer: Any) -> None:
    """Have a tokenizer of open_clip's take words apart by another library, into the same pieces: by
    its own code a word takes the square of its length, and every word that ever came is kept."""
    if not isinstance(tokenizer, SimpleTokenizer):
        return
    special = dict(tokenizer.cache)
    words = BPE(tokenizer.encoder, list(tokenizer.bpe_ranks), end_of_word_suffix="</w>")

    def pieces(word: str) -> str:
        return special.get(word) or " ".join(piece.value for piece in words.tokenize(word))

    tokenizer.bpe = pieces


class FileTokenizer:
    """A `tokenizer.json` whose special tokens are added here. The names of tokens that were added
    to the model's, such as T5's `<extra_id_0>`, are ordinary text. Where those are in the
    vocabulary itself, ids beyond the model's words are refused as they occur.

    Args:
        words: the entries of the model's table of words.

    Attributes:
        special: the token that texts need besides their own.

    Raises:
        CheckpointError: not a readable tokenizer, without `special`, or with ids beyond the table.
    """

    special = ""

    def __init__(self, path: Path, context_length: int, words: int) -> None:
        self.context_length = context_length
        self._words = words
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no class of its own
            raise CheckpointError(f"{path}: not a readable tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        number = self._tokenizer.token_to_id(self.special)
        if number is None:
            raise CheckpointError(f"{path}: this tokenizer has no token {self.special}")
        self._special = number
        added = self._tokenizer.get_added_tokens_decoder()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        used = {number, *(n for name, n in vocabulary.items() if not _EXTRA.fullmatch(name))}
        used |= {number for number, token in added.items() if not token.special}
        if max(used) >= words:
            raise CheckpointError(
                f"{path}: this tokenizer has ids up to {max(used)}, the model {words} words"
            )

    def _encoded(self, text: str) -> Tensor:
        """The ids of a text's first tokens, one fewer than `context_length`.

        Raises:
            InputError: one of them is beyond the model's words.
        """
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        ids = encoded.ids[: self.context_length - 1]
        if ids and max(ids) >= self._words:
            token = encoded.tokens[ids.index(max(ids))]
            raise InputError(f"this model has no word for {token!r}", field="texts")
        return torch.tensor(ids, dtype=torch.long)


class StickyEosTokenizer(FileTokenizer):
    """As LiT uses its SentencePiece model (arXiv 2111.07991): a text's first tokens, then `</s>` up
    to `context_length`, at least once."""

    special = "</s>"

    def __call__(self, texts: list[str]) -> Tensor:
        result = torch.full((len(texts), self.context_length), self._special)
        for row, text in zip(result, texts, strict=True):
            ids = self._encoded(text)
            row[: len(ids)] = ids
        return result


class SiglipTokenizer(StickyEosTokenizer):
    """As transformers' class of that name, for SigLIP (arXiv 2303.15343): texts lose their
    punctuation and upper case before."""

    def _encoded(self, text: str) -> Tensor:
        return super()._encoded(" ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split()))


class Siglip2Tokenizer(FileTokenizer):
    """As transformers' class of that name, for SigLIP 2 (arXiv 2502.14786): a text's first tokens
    in lower case, `<eos>`, then `<pad>`, whose id is 0, up to `context_length`."""

    special = "<eos>"

    def __init__(self, path: Path, context_length: int, words: int) -> None:
        super().__init__(path, context_length, words)
        if (number := self._tokenizer.token_to_id("<pad>")) != 0:
            raise CheckpointError(f"{path}: the id of <pad> is {number}; only 0 is supported")

    def __call__(self, texts: list[str]) -> Tensor:
        result = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(result, texts, strict=True):
            ids = self._encoded(text.lower())
            row[: len(ids)] = ids
            row[len(ids)] = self._special
        return result


class LeadingClsTokenizer(FileTokenizer):
    """As LiT uses BERT's words (arXiv 2111.07991): `[CLS]`, a text's first tokens without an end,
    then zeros up to `context_length`."""

    special = "[CLS]"

    def __call__(self, texts: list[str]) -> Tensor:
        result = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        result[:, 0] = self._special
        for row, text in zip(result, texts, strict=True):
            ids = self._encoded(text)
            row[1 : 1 + len(ids)] = ids
        return result


KINDS = {
    "sticky-eos": StickyEosTokenizer,
    "leading-cls": LeadingClsTokenizer,
    "siglip": SiglipTokenizer,
    "siglip-2": Siglip2Tokenizer,
}


class MissingTokenizer:
    """Stands for a tokenizer that is not beside its model's file, or cannot be used: texts are
    refused with the reason."""

    def __init__(self, source: str, context_length: int, reason: str) -> None:
        self.source = source
        self.context_length = context_length
        self._reason = reason

    def __call__(self, texts: list[str]) -> Tensor:
        raise InputError(f"this model takes token ids alone: {self._reason}", field="texts")


def create_tokenizer(
    name: str,
    context_length: int,
    *,
    source: str | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    folder: str = "",
    words: int = 0,
    reason: str = "",
) -> Any:
    """The tokenizer of a two-tower checkpoint: texts to int64 ids (N, context_length).

    Args:
        name: `openai`, `cutting`, `open_clip`, `hub` for one of transformers', a key of `KINDS`, or
            `unusable`.
        source: the hub's name of it, or what it is.
        mode: `tokenizer_mode` of open_clip's configuration.
        options: `tokenizer_kwargs` of open_clip's configuration.
        folder: where the files of the latter lie.
        words: entries of the model's table of words, for `KINDS`.
        reason: why it is `unusable`.

    Raises:
        CheckpointError: the files of a tokenizer cannot be used.
    """
    if name in FILES:
        files = FILES[name]
        if not all((Path(folder) / file).is_file() for file in files):
            missing = (
                f"its tokenizer, {source}, is not here. Put its {' and '.join(files)} beside the "
                "checkpoint"
            )
            return MissingTokenizer(str(source), context_length, missing)
        if name != "hub":
            return KINDS[name](Path(folder) / files[0], context_length, words)
        return HFTokenizer(folder, context_length, tokenizer_mode=mode, **(options or {}))
    if name == "unusable":
        return MissingTokenizer(str(source), context_length, reason)
    if name == "open_clip":
        return SimpleTokenizer(context_length=context_length, **(options or {}))
    return {"openai": OpenAITokenizer, "cutting": CuttingTokenizer}[name](context_length)
