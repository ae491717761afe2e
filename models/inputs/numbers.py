"""Arrays of numbers that are inputs, such as preprocessed pixels."""

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError

NUMBER_KINDS = "fiu"  # of numpy dtypes


def to_numbers(name: str, array: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """An input array of numbers as float32.

    Raises:
        InputError: another shape, another kind of dtype, or values that are not finite.
    """
    if array.shape != shape:
        raise InputError(
            f"{name} must have shape {list(shape)} for this model, not {list(array.shape)}",
            field=name,
        )
    if array.dtype.kind not in NUMBER_KINDS:
        raise InputError(f"{name} must hold numbers, not {array.dtype}", field=name)
    if not np.isfinite(array).all():
        raise InputError(f"{name} has values that are not finite", field=name)
    return torch.from_numpy(array.astype(np.float32))  # a copy: wire memory is read-only
