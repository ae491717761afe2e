"""What several tasks need to render their answers. Needs no torch."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.tasks.base import Arrays


def predictions(arrays: Arrays) -> dict[str, Any]:
    """`{"predictions": [{"index", "label", "score"}]}`, in the arrays' order."""
    columns = (arrays["index"].tolist(), arrays["label"].tolist(), arrays["score"].tolist())
    return {
        "predictions": [
            {"index": index, "label": label, "score": score}
            for index, label, score in zip(*columns, strict=True)
        ]
    }


def predictions_line(entry: Mapping[str, Any]) -> str:
    """Labels with their scores, separated by commas."""
    return ", ".join(f"{p['label']} {p['score']:.3f}" for p in entry["predictions"])


def image_size(arrays: Arrays) -> dict[str, int]:
    """`{"width", "height"}` of the array `size`."""
    width, height = arrays["size"].tolist()
    return {"width": width, "height": height}


def to_base64(content: np.ndarray) -> str:
    """An array's bytes as base64 text."""
    return base64.b64encode(content.tobytes()).decode()


def npy(array: np.ndarray) -> np.ndarray:
    """An array as the bytes of an .npy file, (N,) uint8."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def first_of(*names: str) -> Callable[..., bytes | None]:
    """A `Body.encode` that returns the first of these outputs that an answer has."""

    def encode(rows: Sequence[Arrays], **render_options: Any) -> bytes | None:
        return next((rows[0][name].tobytes() for name in names if name in rows[0]), None)

    return encode
