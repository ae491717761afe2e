"""Embedding: one vector for each image or text, for retrieval, or one for each patch."""

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from models.inputs.types import Input
from models.tasks.base import NPY, Arrays, Body, Options, Output, Task
from models.tasks.rendering import npy

MAX_TEXTS = 2048
MAX_LAYERS = 64
TOKENS = "tokens"
# Where an image's tokens are: rows and columns of patches, and the part of the image that these
# cover (left, top, right, bottom in its pixels).
PLACES = ("grid", "region")

Encoding = Literal["float", "base64", "int8", "binary"]
Layer = Annotated[int, Field(ge=0, le=999)]
Encoded = list[Any] | str


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
    dimensions: int | None = Field(
        None,
        ge=1,
        description="Keep only the first N dimensions. A model that was not trained for it "
        "refuses, unless `truncate` is true.",
    )
    truncate: bool = Field(
        False, description="Cut to `dimensions` even if the model was not trained for it."
    )
    output: Literal["embedding", "tokens"] = Field(
        "embedding",
        description="tokens: a vector for each patch, row by row, instead of one for the input; "
        "`grid` and `region` say where the patches are.",
    )
    layers: list[Layer] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LAYERS,
        description="Of these blocks, counted from 0, the tokens before the final norm. Only for "
        "output=tokens.",
    )
    prefix: bool = Field(
        False, description="Keep class and register tokens, which come first. For output=tokens."
    )
    encoding: Encoding | Annotated[list[Encoding], Field(min_length=1, max_length=4)] = Field(
        "float",
        description="float: a list of numbers. base64: little-endian float32. int8: integers from "
        "-127 to 127 for -1 to 1. binary: one bit per dimension, eight to an integer, the first "
        "dimension in the highest bit. Of several, an object has each by its name.",
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


def encode_embedding(embedding: np.ndarray, encoding: str) -> Encoded:
    """A (D,) float32 vector as JSON has it; other than base64 also several, (T, D).

    Args:
        encoding: `float`: a list of floats. `base64`: text, of little-endian float32. `int8` and
            `binary`: a list of integers, see `quantize`.
    """
    if encoding == "base64":
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    numbers: list[Any] = quantize(embedding, encoding).tolist()
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


def _render(arrays: Arrays, *, encoding: str | Sequence[str] = "float") -> dict[str, Any]:
    if "embedding" in arrays:
        return {"embedding": _encode(arrays["embedding"], encoding)}
    if TOKENS in arrays:
        places = {name: arrays[name].tolist() for name in PLACES if name in arrays}
        return {TOKENS: _encode(arrays[TOKENS], encoding), **places}
    by_layer = {
        name.removeprefix(f"{TOKENS}."): _encode(array, encoding) for name, array in arrays.items()
    }
    return {TOKENS: by_layer}


def _vectors(arrays: Arrays) -> list[np.ndarray]:
    """An input's arrays without those that say where the vectors are."""
    return [array for name, array in arrays.items() if name not in PLACES]


def _encode(vectors: np.ndarray, encoding: str | Sequence[str]) -> Encoded | dict[str, Encoded]:
    """Vectors (D,) or (T, D) in one encoding, or in each of several by its name. Of (T, D) each of
    the T vectors is encoded by itself."""
    names = [encoding] if isinstance(encoding, str) else list(dict.fromkeys(encoding))
    encoded: dict[str, Encoded] = {}
    for name in names:
        if vectors.ndim == 2 and name == "base64":
            encoded[name] = [encode_embedding(vector, name) for vector in vectors]
        else:
            encoded[name] = encode_embedding(vectors, name)
    return encoded if len(encoded) > 1 else encoded[names[0]]


def _line(entry: Mapping[str, Any]) -> str:
    if (tokens := entry.get(TOKENS)) is not None:
        by_layer = tokens if isinstance(tokens, dict) else {"": tokens}
        shapes = {name: f"{len(rows)} of {len(rows[0])}" for name, rows in by_layer.items()}
        return "tokens: " + ", ".join(f"{name} {shape}".strip() for name, shape in shapes.items())
    vector = entry["embedding"]
    return f"{len(vector)} dimensions: {', '.join(f'{v:.4f}' for v in vector[:4])}, ..."


def _to_npy(rows: Sequence[Arrays], *, encoding: str | Sequence[str] = "float") -> bytes | None:
    """One array of all inputs: (N, D), of tokens (N, T, D), of tokens of layers (N, L, T, D). None
    if layers have tokens of different sizes, or for several encodings."""
    inputs = [_vectors(arrays) for arrays in rows]
    names = [encoding] if isinstance(encoding, str) else encoding
    if len(names) > 1 or len({array.shape for arrays in inputs for array in arrays}) > 1:
        return None
    by_layer = any(f"{TOKENS}." in name for name in rows[0])
    vectors = np.stack([np.stack(arrays) if by_layer else arrays[0] for arrays in inputs])
    return npy(quantize(vectors, names[0])).tobytes()


def _members(arrays: Arrays | None) -> dict[str, Any]:
    if arrays is None:
        return {"dimensions": None}
    widths = {array.shape[-1] for array in _vectors(arrays)}
    return {"dimensions": widths.pop() if len(widths) == 1 else None}


TASK = Task(
    name="embed",
    summary="Embed images or texts for retrieval: one vector each, or one for each patch.",
    options=EmbedOptions,
    outputs=(
        Output("embedding", "FP32", (-1, -1), form=True),
        Output(TOKENS, "FP32", (-1, -1, -1), on_request=True, form=True),
    ),
    render=_render,
    line=_line,
    modalities=("image", "video"),
    bodies=(Body(NPY, _to_npy, first_only=False),),
    members=_members,
    digests=True,
)
