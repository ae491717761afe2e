"""The tensors of a TorchScript archive, read without running its code.

`torch.jit.load` compiles and may run code from the file. The archive is a zip: `data.pkl` describes
the modules' attributes, and each tensor's bytes are a member of their own. This reader replaces
every class by an empty shell and allows only the functions that rebuild a tensor from its bytes.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import CheckpointError

_DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


class _Shell:
    """Replaces any module of the archive; it has attributes, and no behaviour."""


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive, by a member that only those have."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") for name in names)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The state dict of the archive's module.

    Raises:
        CheckpointError: the archive is damaged, or refers to more than modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            reader = _Reader(archive, member)
            return dict(_tensors(reader.load(), ""))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: not a plain TorchScript archive: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: not a readable TorchScript archive: {error}") from error


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, member: str) -> None:
        super().__init__(archive.open(member))
        self._archive = archive
        self._folder = member.removesuffix("data.pkl") + "data/"

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Shell
        match module, name:
            case "torch._utils", "_rebuild_tensor_v2":
                return _rebuild
            case "torch._utils", "_rebuild_parameter":
                return lambda tensor, *_: tensor
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch", storage if storage in _DTYPES:
                return _DTYPES[storage]
            case "torch.jit._pickle", "build_intlist" | "build_tensorlist" | "build_boollist":
                return list
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if not isinstance(key, str) or not key.isdigit():
            raise pickle.UnpicklingError(f"{key!r} is not the name of a storage")
        contents = bytearray(self._archive.read(self._folder + key))
        if len(contents) != count * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key} has {len(contents)} bytes, not {count * dtype.itemsize}"
            )
        if not contents:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(contents, dtype=dtype)


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():
        raise pickle.UnpicklingError("a tensor claims more numbers than the archive holds")
    return torch.as_strided(storage, tuple(size), tuple(stride), offset).clone()


def _tensors(module: Any, prefix: str) -> Any:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Shell):
            yield from _tensors(value, f"{prefix}{name}.")
