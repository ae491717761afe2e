"""A task's named arrays for one image as the entry that clients read. Needs no torch."""

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


def answer_entry(task: str, arrays: Arrays, *, encoding: str = "float") -> dict[str, Any]:
    """One entry of `results`, as the contract words it.

    Args:
        task: `classify`, `zero-shot`, `embed`, `segment`, `attention`, `reconstruct` or
            `generate`.
        arrays: what that task's head returned for one image.
        encoding: for embeddings, see `encode_embedding`.
    """
    match task:
        case "classify" | "zero-shot":
            return {"predictions": _predictions(arrays)}
        case "embed":
            return {"embedding": encode_embedding(arrays["embedding"], encoding)}
        case "segment":
            return _segmentation(arrays)
        case "attention":
            return _attention(arrays)
        case "reconstruct":
            pictures = {name: _base64(arrays[name]) for name in ("drawn", "pasted", "seen")}
            return {**_size(arrays), **pictures, "mask": arrays["mask"].tolist()}
        case "generate":
            return {**_size(arrays), "image": _base64(arrays["png"])}
    raise ValueError(f"no task {task!r}")


def encode_embedding(embedding: np.ndarray, encoding: str) -> list[float] | list[int] | str:
    """A (D,) float32 vector as a list of floats, as base64 of little-endian float32 (`base64`), or
    as a list of whole numbers (`int8`, `binary`: see `quantize`)."""
    if encoding == "base64":
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    plain: list[float] = quantize(embedding, encoding).tolist()
    return plain


def quantize(vectors: np.ndarray, encoding: str) -> np.ndarray:
    """Vectors (..., D) in fewer bits; `float` and `base64` leave them as they are.

    `int8`: 127 times the values, which lie in -1..1 for vectors of unit length, as int8 (..., D).
    `binary`: whether a value is above 0, eight to a byte, first one highest; uint8 (..., D / 8).
    """
    match encoding:
        case "int8":
            rounded: np.ndarray = np.clip(np.rint(vectors * 127), -127, 127).astype(np.int8)
            return rounded
        case "binary":
            packed: np.ndarray = np.packbits(vectors > 0, axis=-1)
            return packed
    return vectors


def _predictions(arrays: Arrays) -> list[dict[str, Any]]:
    columns = (arrays["index"].tolist(), arrays["label"].tolist(), arrays["score"].tolist())
    return [
        {"index": index, "label": label, "score": score}
        for index, label, score in zip(*columns, strict=True)
    ]


def _segmentation(arrays: Arrays) -> dict[str, Any]:
    columns = (arrays["index"].tolist(), arrays["label"].tolist(), arrays["pixels"].tolist())
    classes = [
        {"index": index, "label": label, "pixels": pixels}
        for index, label, pixels in zip(*columns, strict=True)
    ]
    mask: Any
    if "mask" in arrays:
        mask = _base64(npy(arrays["mask"]))
    elif (file := next((n for n in ("png", "overlay", "logits") if n in arrays), None)) is not None:
        mask = _base64(arrays[file])
    else:
        text = arrays["rle"] if "rle" in arrays else arrays["polygons"]
        mask = json.loads(text.tobytes())
    return {**_size(arrays), "classes": classes, "mask": mask}


def _attention(arrays: Arrays) -> dict[str, Any]:
    """`attention` is base64 of whichever form was asked for."""
    [drawn] = [arrays[name] for name in ("overlay", "map", "npy") if name in arrays]
    heads, grid = int(arrays["heads"]), arrays["grid"].tolist()
    return {**_size(arrays), "heads": heads, "grid": grid, "attention": _base64(drawn)}


def npy(array: np.ndarray) -> np.ndarray:
    """An array as the bytes of an .npy file, (N,) uint8."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _size(arrays: Arrays) -> dict[str, int]:
    width, height = arrays["size"].tolist()
    return {"width": width, "height": height}


def _base64(content: np.ndarray) -> str:
    return base64.b64encode(content.tobytes()).decode()
