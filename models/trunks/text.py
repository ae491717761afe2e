"""Text towers: texts in, one embedding each; trunks of their own, batched like all others."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import pad

from models.trunks.base import ClosedTrunk, Placement, TrunkOutput, state_digest
from models.trunks.features import NOTHING, Need

# Of a text before it is tokenized; what a tokenizer keeps is far less.
MAX_CHARACTERS = 10_000

Tokenize = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class TextPreprocess:
    """How texts become token ids. `tokenizer_digest` is over everything that decides them."""

    context_length: int
    tokenizer_digest: str

    @property
    def digest(self) -> str:
        text = f"{self.context_length} {self.tokenizer_digest}"
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class TextTrunk(ClosedTrunk):
    """What text trunks share: tokens padded to the longest text of a batch.

    `pad_id` fills up; a subclass says in `encode` what to make of a batch.
    """

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
        self.architecture = architecture
        self.preprocess = preprocess
        self.tokenize = tokenize
        self.digest = state_digest(network.state_dict())
        self.network: Any = placement.apply(network)
        self.placement = placement

    def collate(self, inputs: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
        longest = max(len(ids) for ids in inputs)
        rows = [pad(ids, (0, longest - len(ids)), value=self.pad_id) for ids in inputs]
        batch = torch.stack(rows)
        return batch.pin_memory() if pin_memory else batch

    def blank(self) -> Tensor:
        return self.tokenize("a " * self.preprocess.context_length)  # the longest, for warming up

    def forward(self, batch: Tensor, need: Need = NOTHING) -> TrunkOutput:
        embedding = self.encode(batch.to(self.placement.device, non_blocking=True))
        return TrunkOutput(embedding.unsqueeze(1), 1, (0, 0))

    def encode(self, ids_BT: Tensor) -> Tensor:
        """(B, T) token ids to (B, D) embeddings, not normalised."""
        raise NotImplementedError

    def pool(self, output: TrunkOutput) -> Tensor:
        return output.features[:, 0]


class OpenClipText(TextTrunk):
    """The text tower of an open_clip model, with open_clip's own tokenizer."""

    def encode(self, ids_BT: Tensor) -> Tensor:
        embedding: Tensor = self.network.encode_text(ids_BT)
        return embedding


class TextTower(TextTrunk):
    """A text transformer that gives the projected embedding itself."""

    def encode(self, ids_BT: Tensor) -> Tensor:
        embedding: Tensor = self.network(ids_BT)
        return embedding


class SentenceEncoder(TextTrunk):
    """A BERT whose embedding is the mean over a text's tokens (sentence-transformers' `mean`)."""

    def encode(self, ids_BT: Tensor) -> Tensor:
        mask_BT = (ids_BT != self.pad_id).long()
        states_BTD = self.network(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        weights_BT1 = mask_BT.unsqueeze(-1).to(states_BTD.dtype)
        summed: Tensor = (states_BTD * weights_BT1).sum(1)
        return summed / weights_BT1.sum(1).clamp(min=1)


def fast_tokenizer(tokenizer: Tokenizer, context_length: int) -> Tokenize:
    """A `tokenizer.json` as a function of one text, cut to `context_length`, without padding."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(context_length)
    return lambda text: torch.tensor(tokenizer.encode(text).ids)
