"""Text trunks: texts in, one embedding each. They are batched like all other trunks."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import pad

from models.errors import InputError
from models.inputs.images import DEFAULT_LIMITS, ImageLimits
from models.trunks.base import Trunk
from models.trunks.devices import Placement
from models.trunks.features import PassPlan
from models.trunks.output import TrunkOutput

# Before a text is tokenized. What a tokenizer keeps is far less.
MAX_CHARACTERS = 10_000

Tokenize = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class TextPreprocess:
    """How texts become token ids.

    Args:
        context_length: most tokens of a text.
        tokenizer_digest: SHA-256 over everything that decides the ids.
    """

    context_length: int
    tokenizer_digest: str

    @property
    def digest(self) -> str:
        text = f"{self.context_length} {self.tokenizer_digest}"
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class TextPass(nn.Module):
    """Token ids (B, T) to `embedding` (B, D)."""

    def __init__(self, network: nn.Module, encode: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self._encode = encode

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"embedding": self._encode(self.network, ids)}


class TextTrunk(Trunk):
    """What text trunks share. Tokens are padded with `pad_id` to the longest text of a batch; a
    subclass has `encode`."""

    modality = "text"
    pad_id = 0

    def __init__(
        self,
        architecture: str,
        network: nn.Module,
        tokenize: Tokenize,
        preprocess: TextPreprocess,
        placement: Placement,
    ) -> None:
        super().__init__(architecture, network, preprocess, placement)
        self.tokenize = tokenize

    @staticmethod
    def encode(network: Any, ids_BT: Tensor) -> Tensor:
        """(B, T) token ids to (B, D) embeddings, not normalised."""
        raise NotImplementedError

    def create_pass(self, plan: PassPlan) -> nn.Module:
        return TextPass(self.network, self.encode)

    def output(self, batch: Tensor, tensors: Mapping[str, Tensor]) -> TrunkOutput:
        return TrunkOutput(tensors["embedding"].unsqueeze(1), 1, (0, 0))

    def pool(self, output: TrunkOutput) -> Tensor:
        return output.features[:, 0]

    def prepare(self, item: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
        """A text as token ids (T,)."""
        if not item.strip():
            raise InputError("the text is empty", field="texts")
        if len(item) > MAX_CHARACTERS:
            raise InputError(
                f"the text has {len(item)} characters; the limit is {MAX_CHARACTERS}",
                field="texts",
            )
        return self.tokenize(item)

    def collate(self, inputs: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
        longest = max(len(ids) for ids in inputs)
        rows = [pad(ids, (0, longest - len(ids)), value=self.pad_id) for ids in inputs]
        return super().collate(rows, pin_memory=pin_memory)

    def check_ids(self, ids: Tensor) -> None:
        """Check token ids that a caller made.

        Raises:
            InputError: not (N, T) whole numbers, more than the context holds, or beyond the
                vocabulary.
        """
        if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex():
            raise InputError(
                f"token ids are whole numbers (N, T), not {ids.dtype} {tuple(ids.shape)}",
                field="token_ids",
            )
        # a BERT takes more than its tokenizer makes
        limit = getattr(self.network, "context_length", None)
        if limit is not None and ids.shape[1] > limit:
            raise InputError(f"{ids.shape[1]} token ids; the limit is {limit}", field="token_ids")
        words = next(m for m in self.network.modules() if isinstance(m, nn.Embedding))
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < words.num_embeddings:
            raise InputError(
                f"token ids are 0 to {words.num_embeddings - 1}; these are {int(ids.min())} to "
                f"{int(ids.max())}",
                field="token_ids",
            )

    def blank(self) -> Tensor:
        # the longest, for warm-up
        return self._tokens("a " * self.preprocess.context_length, 0)

    def samples(self, count: int) -> list[Tensor]:
        texts = (f"a photo of {number} cats, taken outside" for number in range(count))
        return [self._tokens(text, number) for number, text in enumerate(texts)]

    def _tokens(self, text: str, substitute: int) -> Tensor:
        """The token ids (T,) of a text; without a tokenizer, T times a substitute."""
        try:
            return self.tokenize(text)
        except InputError:
            return torch.full((self.preprocess.context_length,), substitute)


class OpenClipText(TextTrunk):
    """The text tower of an open_clip model, with open_clip's own tokenizer."""

    @staticmethod
    def encode(network: Any, ids_BT: Tensor) -> Tensor:
        embedding: Tensor = network.encode_text(ids_BT)
        return embedding


class TextTower(TextTrunk):
    """A text transformer that returns the projected embedding."""

    @staticmethod
    def encode(network: Any, ids_BT: Tensor) -> Tensor:
        embedding: Tensor = network(ids_BT)
        return embedding


class SentenceEncoder(TextTrunk):
    """A BERT whose embedding is the mean over a text's tokens (sentence-transformers' `mean`)."""

    @staticmethod
    def encode(network: Any, ids_BT: Tensor) -> Tensor:
        mask_BT = (ids_BT != TextTrunk.pad_id).long()
        states_BTD = network(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        weights_BT1 = mask_BT.unsqueeze(-1).to(states_BTD.dtype)
        summed: Tensor = (states_BTD * weights_BT1).sum(1)
        return summed / weights_BT1.sum(1).clamp(min=1)


def fast_tokenizer(tokenizer: Tokenizer, context_length: int) -> Tokenize:
    """A `tokenizer.json` as a function of one text, cut to `context_length`, without padding."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(context_length)
    return lambda text: torch.tensor(tokenizer.encode(text).ids)
