"""A model: what a request names. A head on a trunk."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.errors import InputError, ModalityError, TaskError
from models.heads.base import Head
from models.heads.embed import Embed
from models.heads.lora import adapted_heads
from models.heads.prompted import Prompted, with_class_embeddings
from models.heads.registry import heads_of
from models.inference import (
    HeadCall,
    decode,
    finish,
    finish_options,
    image_size,
    least_side,
    prepare_pieces,
    run_rows,
)
from models.inputs.images import DEFAULT_LIMITS, ImageLimits, to_upright_rgb
from models.inputs.prompts import ensemble, prompts
from models.inputs.types import Input, Seed, Video, modality_of
from models.reference_outputs import FormatOutputs, Parts, reference_outputs
from models.started_pass import Row
from models.tasks.table import get_task, parse_options
from models.trunks.adapters import Adapter
from models.trunks.base import Trunk
from models.trunks.features import LAST_OUTPUT, NO_EXTRAS, FeatureRequest, merge
from models.trunks.text import TextTrunk

TEXT_BATCH = 32

ImageLike = Image.Image | bytes | str | Path


class Model:
    """Does its own head's task, and those of the heads that every such trunk has (`embed`, ...).

    Attributes:
        task: the own head's task.
        heads: all heads by task.
        text: the trunk that reads texts, if there is one; of a model of texts alone it is `trunk`.
        digest: SHA-256 over weights, transform, task and, other than float32, the precision. While
            it stays, so do answers.
    """

    def __init__(
        self,
        name: str,
        trunk: Trunk,
        head: Head,
        *,
        text: TextTrunk | None = None,
        format_outputs: FormatOutputs | None = None,
        format_request: FeatureRequest = NO_EXTRAS,
        about: Mapping[str, Any] | None = None,
        states: Mapping[str, HeadState] | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """
        Args:
            format_outputs: further outputs of `run`, under the names that the checkpoint's authors
                gave them.
            format_request: what `format_outputs` needs of a pass.
            about: how a head that has a file of its own was trained.
            states: weights that came in the checkpoint besides the trunk's.
            adapter: a low-rank adapter that its passes of the trunk go through.
        """
        self.name = name
        self.trunk = trunk
        self.task = head.task
        self.text = trunk if isinstance(trunk, TextTrunk) else text
        self.about = about or {}
        self.adapter = adapter
        self.heads = heads_of(trunk, head, states or {})
        if adapter is not None:
            self.heads = adapted_heads(self.heads, adapter)
            format_request = replace(format_request, adapter=adapter)
        self.text_embed = self._create_text_embed(head)
        text_head = (self.text, self.text_embed) if self.text and self.text_embed else None
        self._parts = Parts(
            trunk, self.heads, self.task, text_head, states or {}, format_request, format_outputs
        )
        self.trunk_bytes = trunk.nbytes
        self.head_bytes = self._count_head_bytes()
        self.digest = self._digest()

    def _create_text_embed(self, head: Head) -> Head | None:
        if self.text is None:
            return None
        own = head.text_embed if isinstance(head, Prompted) else None
        return own or Embed(self.text)

    def _count_head_bytes(self) -> int:
        """Bytes of all heads' weights; heads that share a network count once."""
        heads = [*self.heads.values(), *([self.text_embed] if self.text_embed else [])]
        own = 0 if self.adapter is None else self.adapter.nbytes
        return own + sum({id(head.network): head.nbytes for head in heads}.values())

    def _digest(self) -> str:
        digests = self.heads[self.task].digests
        if self.adapter is not None:
            digests = [*digests, self.adapter.digest]
        if self.text_embed is not None:
            digests = digests + self.text_embed.digests
        text = f" {self.text.digest} {self.text.preprocess.digest}" if self.text else ""
        parts = f"{self.trunk.digest} {self.trunk.preprocess.digest} {self.task} "
        parts += " ".join(digests) + text
        precisions = [trunk.placement.precision_key for trunk in (self.trunk, self.text) if trunk]
        parts += "".join(f" {precision}" for precision in precisions if precision)
        return "sha256:" + hashlib.sha256(parts.encode()).hexdigest()

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model does, its own task first."""
        return (self.task, *(task for task in self.heads if task != self.task))

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it takes: `image`, `text`, `video` or `latent`."""
        own = self.trunk.modality
        return (own,) if self.text in (None, self.trunk) else (own, "text")

    def build(self) -> None:
        """Have the engines begin to build the passes of the model's own task."""
        own = self.heads[self.task]
        self.trunk.build(merge([(own.request, range(2))]))
        if self.text is not None and self.text is not self.trunk:
            self.text.build(LAST_OUTPUT)

    def trunk_for(self, modality: str) -> Trunk:
        """The trunk that takes `image`, `text`, `video` or `latent` inputs.

        Raises:
            ModalityError: the model takes only others.
        """
        if modality not in self.modalities:
            takes = " and ".join(f"{each}s" for each in self.modalities)
            field = {"text": "texts"}.get(modality, modality)
            raise ModalityError(f"model {self.name!r} takes {takes}, not {modality}s", field=field)
        if modality == "text" and self.text is not None:
            return self.text
        return self.trunk

    def head_for(self, modality: str, task: str | None, options: Mapping[str, Any]) -> Head:
        """The head that does `task` for inputs of a modality, with its options checked.

        Raises:
            TaskError, InputError: as `head` and `trunk_for`.
        """
        self.trunk_for(modality)
        if modality != "text":
            return self.head(task, options)
        if (task or self.task) != "embed":
            raise InputError(
                f"texts can be embedded, but not used for {task or self.task}", field="texts"
            )
        assert self.text_embed is not None
        self.text_embed.check(options)
        return self.text_embed

    def head(self, task: str | None, options: Mapping[str, Any]) -> Head:
        """The head for `task` (the model's own if None), with its options checked.

        Raises:
            TaskError: this model does not do that task.
            InputError: an option that this model cannot honour.
        """
        head = self.heads.get(task or self.task)
        if head is None:
            raise TaskError(
                f"model {self.name!r} does not do {task!r}; it does {', '.join(self.tasks)}",
                field="model",
            )
        head.check(options)
        return head

    def predict(
        self,
        inputs: Sequence[ImageLike | Input | int],
        *,
        task: str | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """The entries of `results` that a server would answer with, one for each input.

        Args:
            inputs: images; of a model for clips `Video`s or their bytes, of a generator `Seed`s,
                integers that stand for seeds, or `Latent`s.
            options: those of the task, see `models/tasks`.

        Raises:
            InputError: an input that does not decode, or an option out of range.
        """
        parsed = parse_options(task or self.task, options)
        head_options = parsed.head_options()
        head = self.head(task, head_options)
        if isinstance(head, Prompted):
            labels, templates = head.prompt(head_options)
            classes = self.class_embeddings(labels, templates)
            head_options = with_class_embeddings(head_options, labels, classes)
        whole = head.needs_image(finish_options(head, head_options))
        min_side = None if whole else least_side([(self.trunk, head.view)])
        render = get_task(head.task).render
        return [
            render(
                self._answer(self._load(item, limits, min_side), head, head_options, limits),
                **parsed.render_options(),
            )
            for item in inputs
        ]

    def _load(self, item: Any, limits: ImageLimits, min_side: int | None) -> Any:
        """The input that bytes, a path or a number stand for, by what the model takes."""
        if self.trunk.modality == "video" and isinstance(item, bytes):
            return Video(item)
        if self.trunk.modality == "latent" and isinstance(item, int):
            return Seed(item)
        return load_image(item, limits, min_side)

    def _answer(
        self, item: Any, head: Head, options: Mapping[str, Any], limits: ImageLimits
    ) -> dict[str, np.ndarray]:
        trunk = self.trunk_for(modality_of(item))
        size = image_size(item)
        call = HeadCall.of(head, options).at_size(size)
        pieces = prepare_pieces(item, trunk, head.view, limits)
        rows = [run_rows(trunk, trunk.collate([piece]), call)[0] for piece in pieces]
        return finish(head, rows, finish_options(head, options), item, size, limits)

    def embed_texts(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """(N, D) float32 embeddings of texts, as a server would return them."""
        head = self.head_for("text", "embed", options)
        text, call = self.trunk_for("text"), HeadCall.of(head, options)
        rows: list[Row] = []
        for start in range(0, len(texts), TEXT_BATCH):
            ids = [text.prepare(item) for item in texts[start : start + TEXT_BATCH]]
            rows += run_rows(text, text.collate(ids), call)
        rest = finish_options(head, options)
        return np.stack([head.finish(row, (0, 0), **rest)["embedding"] for row in rows])

    def class_embeddings(self, labels: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """(labels, D) float32 of unit length: what a prompted head compares images with."""
        return ensemble(self.embed_texts(prompts(labels, templates)), len(templates))

    def run(
        self,
        pixel_values: Tensor | None = None,
        token_ids: Tensor | None = None,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """All outputs by the names of the checkpoint's authors, float32 on the CPU.

        Args:
            pixel_values: preprocessed images (B, 3, H, W): the head's outputs, `embedding` (the
                trunk's own pooling, not normalised) and `tokens` or `feature_map`; of a model of
                two towers `image_embedding`.
            token_ids: (N, T) for `text_embedding`; with images also `logits_per_image` (B, N).
            inputs: what else the checkpoint's format takes, such as `noise` to mask patches by, or
                a generator's `latent`.

        Raises:
            InputError: images of a size that the network does not take.
        """
        named = {"pixel_values": pixel_values, "token_ids": token_ids, **inputs}
        present = {name: tensor for name, tensor in named.items() if tensor is not None}
        return reference_outputs(self._parts, present)


def load_image(
    image: ImageLike | Input, limits: ImageLimits = DEFAULT_LIMITS, min_side: int | None = None
) -> Any:
    """An upright RGB image from a Pillow image, encoded bytes or a path; other inputs unchanged.

    Args:
        min_side: see `models.inference.decode`.
    """
    if isinstance(image, bytes):
        return decode(image, limits, min_side)
    if isinstance(image, Image.Image):
        return to_upright_rgb(image)
    if not isinstance(image, str | Path):
        return image
    try:
        return decode(Path(image).read_bytes(), limits, min_side)
    except OSError as error:
        raise InputError(f"{image}: {error.strerror}") from error
