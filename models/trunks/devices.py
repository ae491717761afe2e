"""Devices and number types by the names that settings use."""

import torch

from models.errors import CatalogError


def resolve_device(device: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise CatalogError(f"no device {device!r}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise CatalogError(f"device {device!r} was asked for, but torch sees no GPU")
    return resolved


def resolve_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` as torch's type."""
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in dtypes:
        raise CatalogError(f"no dtype {name!r}; there are {', '.join(dtypes)}")
    return dtypes[name]
