"""Embedding: one vector for each image or text, for retrieval."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from models.inputs.types import Input
from models.tasks.base import NPY, Arrays, Body, Options, Output, Task
from models.tasks.rendering import npy

MAX_TEXTS = 2048


class EmbedOptions(Options):
    input_fields: ClassVar[frozenset[str]] = frozenset({"texts"})
    render_fields: ClassVar[frozenset[str]] = frozenset({"encoding"})

    texts: list[str] | None = Field(
        None, min_length=1, max_length=MAX_TEXTS, description="Texts instead of images."
    )
    pooling: Literal["cls", "mean", "max", "gem", "ggem"] | None = Field(
        None, description="How tokens become one vector; the model's own pooling if not given."
    )
    normalize: bool = Field(True, description="Scale to unit length.")
    dimensions: int | None = Field(None, ge=1, description="Keep only the first N dimensions.")
    encoding: Literal["float", "base64", "int8", "binary"] = Field(
        "float",
        description="float: a list of numbers. base64: little-endian float32. int8: integers from "
        "-127 to 127 for -1 to 1. binary: one bit per dimension, eight to an integer, the first "
        "dimension in the highest bit.",
    )

    gsd: float | None = Field(
        None,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Ground sample distance: metres per pixel of the sent image. Only Scale-MAE "
        "takes it.",
    )

    def inputs(self) -> Sequence[Input] | None:
        return self.texts


def encode_embedding(embedding: np.ndarray, encoding: str) -> list[float] | list[int] | str:
    """A (D,) float32 vector as JSON has it.

    Args:
        encoding: `float`: a list of floats. `base64`: text, of little-endian float32. `int8` and
            `binary`: a list of integers, see `quantize`.
    """
    if encoding == "base64":
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    numbers: list[float] = quantize(embedding, encoding).tolist()
    return numbers


def quantize(vectors: np.ndarray, encoding: str) -> np.ndarray:
    """Vectors (..., D) in fewer bits.

    `int8`: values of -1 to 1, which unit vectors have, scaled by 127 and rounded; int8 (..., D).
    `binary`: 1 where a value is above 0, eight to a byte, first one highest; uint8 (..., D / 8).
    `float` and `base64` leave the vectors unchanged.
    """
    match encoding:
        case "int8":
            rounded: np.ndarray = np.clip(np.rint(vectors * 127), -127, 127).astype(np.int8)
            return rounded
        case "binary":
            packed: np.ndarray = np.packbits(vectors > 0, axis=-1)
            return packed
    return vectors


def _render(arrays: Arrays, *, encoding: str = "float") -> dict[str, Any]:
    return {"embedding": encode_embedding(arrays["embedding"], encoding)}


def _line(entry: Mapping[str, Any]) -> str:
    vector = entry["embedding"]
    return f"{len(vector)} dimensions: {', '.join(f'{v:.4f}' for v in vector[:4])}, ..."


def _to_npy(rows: Sequence[Arrays], *, encoding: str = "float") -> bytes:
    """One array (N, D) of all embeddings."""
    vectors = np.stack([arrays["embedding"] for arrays in rows])
    return npy(quantize(vectors, encoding)).tobytes()


def _members(arrays: Arrays | None) -> dict[str, Any]:
    return {"dimensions": None if arrays is None else len(arrays["embedding"])}


TASK = Task(
    name="embed",
    summary="Embed images or texts for retrieval: one vector each.",
    options=EmbedOptions,
    outputs=(Output("embedding", "FP32", (-1, -1)),),
    render=_render,
    line=_line,
    modalities=("image", "video"),
    bodies=(Body(NPY, _to_npy, first_only=False),),
    members=_members,
    digests=True,
)
