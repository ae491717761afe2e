"""A model: what a request names. A head on a trunk, with the trunk's own preprocessing."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.checkpoints.checkpoint import HeadState
from models.errors import InputError, TaskError
from models.heads.attention import Attention, has_attention
from models.heads.dense import DenseClip
from models.heads.embed import Embed
from models.heads.linear import Linear
from models.heads.prompted import Prompted, answering
from models.heads.reconstruct import Reconstruct
from models.heads.registry import Head
from models.heads.scaled import ScaledEmbed
from models.heads.vqt import Vqt
from models.heads.zero_shot import ZeroShot
from models.inputs.images import DEFAULT_LIMITS, ImageLimits, decode_image, to_upright_rgb
from models.inputs.prepare import prepare, size_of
from models.inputs.prompts import ensemble, prompts
from models.inputs.transforms import create_transform
from models.inputs.types import Input, Seed, Video, modality_of
from models.networks.scale_vit import ScaleVit
from models.reference_outputs import run_dense, run_generator, run_images, run_towers
from models.tasks.table import get_task
from models.trunks.base import Trunk, TrunkOutput, parameter_bytes, state_digest
from models.trunks.features import NOTHING, Need
from models.trunks.generator import Generator
from models.trunks.text import TextTrunk
from models.trunks.video import create_clip_transform

TEXT_BATCH = 32

Outputs = Callable[["Model", TrunkOutput, Mapping[str, Tensor]], dict[str, Tensor]]

ImageLike = Image.Image | bytes | str | Path


class Model:
    """Serves its head's task; and `embed`, since every trunk can be pooled.

    `text` is the trunk that reads texts, if there is one; of a model of texts alone it is `trunk`.

    `digest` is over weights, transform and task: while it stays, so do embeddings (of one dtype).
    """

    def __init__(
        self,
        name: str,
        trunk: Trunk,
        head: Head,
        *,
        text: TextTrunk | None = None,
        text_embed: Embed | None = None,
        outputs: Outputs | None = None,
        need: Need = NOTHING,
        about: Mapping[str, Any] | None = None,
        states: Mapping[str, HeadState] | None = None,
    ) -> None:
        """
        Args:
            text_embed: what makes embeddings of the text trunk's output, if not its pooling alone.
            outputs: what `run` gives besides, by the names of the checkpoint's authors; and what
                it `need`s of the pass.
            about: how a head of a file of its own came to be.
            states: what came in the checkpoint besides the trunk; `outputs` may use it.
        """
        self.name = name
        self.trunk = trunk
        self.task = head.task
        self.text = trunk if isinstance(trunk, TextTrunk) else text
        self.outputs = outputs
        self.need = need
        self.about = about or {}
        self.states = states or {}
        self.heads = self._heads(trunk, head)
        if trunk.modality == "image":
            self.transform = create_transform(trunk.preprocess)
        elif trunk.modality == "video":
            self.clip_transform = create_clip_transform(trunk.preprocess)
        if self.text is not None:
            self.text_embed = text_embed or Embed(self.text)
        networks = [head.network, self.text_embed.network if self.text else None]
        drawing = self.heads.get("reconstruct")
        self.trunk_bytes = parameter_bytes(trunk.network)
        every = [*networks, drawing.network if drawing else None]
        self.head_bytes = sum(parameter_bytes(network) for network in every if network)
        if isinstance(head, Vqt):
            self.head_bytes += head.queries.nbytes
        self.digest = self._digest(networks)

    def _heads(self, trunk: Trunk, head: Head) -> dict[str, Head]:
        """The model's own head, and those that every such trunk has."""
        if trunk.modality == "latent":
            return {head.task: head}
        embed = head.embed if isinstance(head, ZeroShot) else head
        if not isinstance(embed, Embed):
            embed = (ScaledEmbed if isinstance(trunk.network, ScaleVit) else Embed)(trunk)
        heads: dict[str, Head] = {"embed": embed, head.task: head}
        if has_attention(trunk):
            heads["attention"] = Attention(trunk)
        if "decoder" in self.states:
            heads["reconstruct"] = Reconstruct(trunk, self.states["decoder"])
        return heads

    def _digest(self, networks: Sequence[nn.Module | None]) -> str:
        weights = [state_digest(network.state_dict()) for network in networks if network]
        if isinstance(head := self.heads[self.task], Linear):
            weights = [head.digest]
        text = f" {self.text.digest} {self.text.preprocess.digest}" if self.text else ""
        parts = f"{self.trunk.digest} {self.trunk.preprocess.digest} {self.task} "
        parts += " ".join(weights) + text
        return "sha256:" + hashlib.sha256(parts.encode()).hexdigest()

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it takes: `image`, `text`, `video` or `latent`."""
        own = self.trunk.modality
        return (own,) if self.text in (None, self.trunk) else (own, "text")

    def trunk_for(self, modality: str) -> Trunk:
        """The trunk that takes `image`, `text`, `video` or `latent` inputs.

        Raises:
            InputError: the model takes only others.
        """
        if modality not in self.modalities:
            takes = " and ".join(f"{each}s" for each in self.modalities)
            field = {"text": "texts"}.get(modality, modality)
            raise InputError(f"model {self.name!r} takes {takes}, not {modality}s", field=field)
        if modality == "text" and self.text is not None:
            return self.text
        return self.trunk

    def head_for(self, modality: str, task: str | None, options: Mapping[str, Any]) -> Head:
        """The head that answers `task` for such inputs, having checked `options` with it.

        Raises:
            TaskError, InputError: as `head` and `trunk_for`.
        """
        self.trunk_for(modality)
        if modality != "text":
            return self.head(task, options)
        if (task or self.task) != "embed":
            raise InputError(
                f"texts can be embedded, not asked for {task or self.task}", field="texts"
            )
        self.text_embed.check(options)
        return self.text_embed

    def head(self, task: str | None, options: Mapping[str, Any]) -> Head:
        """The head for `task` (the model's own if None), having checked `options` with it.

        Raises:
            TaskError: this model does not do that.
            InputError: an option out of what this model can do.
        """
        head = self.heads.get(task or self.task)
        if head is None:
            raise TaskError(
                f"model {self.name!r} does not do {task!r}; it does {', '.join(self.tasks)}",
                field="model",
            )
        head.check(options)
        return head

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model does, its own task first."""
        return (self.task, *(task for task in self.heads if task != self.task))

    def predict(
        self,
        inputs: Sequence[ImageLike | Input | int],
        *,
        task: str | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Answer as the server would: one entry an input, in order.

        Args:
            inputs: images; of a model for clips `Video`s or their bytes, of a generator `Seed`s,
                whole numbers for such, or `Latent`s.

        Raises:
            InputError: an input that does not decode, or an option out of range.
        """
        head = self.head(task, options)
        if isinstance(head, Prompted):
            labels, templates = head.prompt(options)
            options = answering(options, labels, self.class_embeddings(labels, templates))
        return [self._answer(self._load(each, limits), head, options, limits) for each in inputs]

    def _load(self, given: Any, limits: ImageLimits) -> Any:
        """What bytes, a path or a number stand for, by what the model takes."""
        if self.trunk.modality == "video" and isinstance(given, bytes):
            return Video(given)
        if self.trunk.modality == "latent" and isinstance(given, int):
            return Seed(given)
        return load_image(given, limits)

    def _answer(
        self, given: Any, head: Head, options: Mapping[str, Any], limits: ImageLimits
    ) -> dict[str, Any]:
        self.trunk_for(modality_of(given))
        size = size_of(given)
        options = head.at_size(options, size)
        pieces = prepare(given, self, head.view, limits)
        rows = [self.forward(self.trunk.collate([piece]), head, options)[0] for piece in pieces]
        view = head.view if isinstance(given, Image.Image) else None
        row = rows[0] if view is None else view.merge(rows, size)
        finish = {k: v for k, v in options.items() if k not in head.forward_options}
        if head.sees_image(options):
            finish["image"] = given
        return get_task(head.task).render(head.finish(row, size, **finish))

    @torch.inference_mode()
    def forward(
        self, pixels_BCHW: Tensor, head: Head, options: Mapping[str, Any]
    ) -> list[dict[str, np.ndarray]]:
        """Trunk and head for a batch of pixels; named float32 arrays for each row."""
        output = self.trunk.forward(pixels_BCHW, head.needs(range(len(pixels_BCHW))))
        forward = {k: v for k, v in options.items() if k in head.forward_options}
        tensors = head.forward(output, **forward)
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
        return [
            {name: array[row] for name, array in arrays.items()} for row in range(len(pixels_BCHW))
        ]

    def embed_texts(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """(N, D) float32 embeddings of texts, as the server would give them."""
        head = self.head_for("text", "embed", options)
        text = self.trunk_for("text")
        assert isinstance(text, TextTrunk)
        rows = []
        for start in range(0, len(texts), TEXT_BATCH):
            ids = [text.tokenize(item) for item in texts[start : start + TEXT_BATCH]]
            with torch.inference_mode():
                embedded = head.forward(text.forward(text.collate(ids)))["embedding"]
            rows += [{"embedding": row} for row in embedded.float().cpu().numpy()]
        return np.stack([head.finish(row, (0, 0), **options)["embedding"] for row in rows])

    def class_embeddings(self, labels: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """(labels, D) float32 of unit length: what a zero-shot head compares images with."""
        return ensemble(self.embed_texts(prompts(labels, templates)), len(templates))

    @torch.inference_mode()
    def run(
        self,
        pixel_values: Tensor | None = None,
        token_ids: Tensor | None = None,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """All named outputs, float32 on the CPU.

        Args:
            pixel_values: preprocessed images (B, 3, H, W): the head's outputs, `embedding` (the
                trunk's own pooling, not normalised) and `tokens` or `feature_map`; of a model of
                two towers `image_embedding` and what it is projected from.
            token_ids: (N, T) for `text_embedding`; with images `logits_per_image` (B, N).
            inputs: what else the checkpoint's format takes, such as `noise` to mask patches by, or
                a generator's `latent`; see `models/reference_outputs.py`.
        """
        named: dict[str, Tensor] = {}
        if isinstance(self.trunk, Generator):
            named = run_generator(self.trunk, inputs)
        elif isinstance(head := self.heads[self.task], ZeroShot):
            named = run_towers(self, head, pixel_values, token_ids)
        elif isinstance(head, DenseClip):
            named = run_dense(self, head, pixel_values, token_ids)
        elif pixel_values is not None:
            named = run_images(self, {"pixel_values": pixel_values, **inputs})
        return {name: tensor.float().cpu() for name, tensor in named.items()}


def load_image(image: ImageLike | Input, limits: ImageLimits = DEFAULT_LIMITS) -> Any:
    """An upright RGB image from a Pillow image, encoded bytes or a path; other inputs as they
    are."""
    if isinstance(image, bytes):
        return decode_image(image, limits)
    if isinstance(image, Image.Image):
        return to_upright_rgb(image)
    if not isinstance(image, str | Path):
        return image
    try:
        return decode_image(Path(image).read_bytes(), limits)
    except OSError as error:
        raise InputError(f"{image}: {error.strerror}") from error
