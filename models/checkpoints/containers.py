"""Safe reading of checkpoint files: safetensors, npz, ONNX, torch, and indices of shards.

A file's code is never run.
"""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.checkpoints.shards import SUFFIX as INDEX_SUFFIX
from models.checkpoints.shards import check_shard, read_index
from models.checkpoints.torchscript import is_torchscript, read_torchscript
from models.errors import CheckpointError

# Keys that common training scripts nest the weights under.
WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "model_state", "teacher")

# What wrappers of modules add to names, the inner one last.
PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")

# Types beside tensors that torch may load, since constructing them runs no code: the training
# script's arguments, and numpy's scalars under their names in numpy 1 and 2.
_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
ALLOWED_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"),
]

# Entries that only resuming a training run reads.
TRAINING_ENTRIES = ("optimizer", "optimizer_state", "scaler", "lr_scheduler", "scheduler")
# A zip archive may unpack to so many times its size, plus ROOM_BYTES: weights hardly compress.
MAX_COMPRESSION = 20
ROOM_BYTES = 2**20
# Downloads that broke off are the usual reason, and what the libraries say does not tell.
CUT_OFF = "is it cut off? Compare its size with the publisher's"


@dataclass(frozen=True, slots=True)
class Container:
    """The contents of a checkpoint file.

    Args:
        tensors: the weights by name.
        metadata: the metadata of a safetensors file.
        wrapper: the key of a torch file that `tensors` were nested under; empty for none.
        sets: all state dicts of a torch file by key, such as `student` and `teacher`.
        beside: a torch file's other entries; strings, numbers and arguments (as a mapping) with
            their values, anything else as None.
        graph: an ONNX file's graph, which names anonymous weights by their use.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    wrapper: str = ""
    sets: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    graph: Any = None

    @property
    def script(self) -> Mapping[str, Any]:
        """The training script's arguments, if they are stored beside the weights."""
        arguments = self.beside.get("args")
        return arguments if isinstance(arguments, dict) else {}


def open_container(path: Path) -> Container:
    """Read `.safetensors`, `.npz`, `.onnx`, the shards of an `.index.json`, or a torch file (any
    other suffix).

    Raises:
        CheckpointError: the file is missing, damaged, or a pickle that needs code to be run.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the checkpoint file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    match path.suffix:
        case ".safetensors":
            return _open_safetensors(path)
        case ".npz":
            _check_zip(path)
            return _open_npz(path)
        case ".onnx":
            return _open_onnx(path)
        case _:
            _check_zip(path)
            return _open_torch(path)


def _open_shards(index: Path) -> Container:
    """One container of all shards' tensors, its `path` the index's.

    Raises:
        CheckpointError: a shard is missing or damaged, or has not the tensors that the index says.
    """
    tensors: dict[str, Tensor] = {}
    for name, stated in read_index(index).items():
        shard = open_container(index.parent / name)
        check_shard(shard.path, frozenset(shard.tensors), stated)
        tensors |= shard.tensors
    return Container(index, tensors)


def _check_zip(path: Path) -> None:
    """Refuse a zip bomb. torch stores its members uncompressed, numpy hardly compresses weights."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a readable zip archive: {error}") from error
    limit = MAX_COMPRESSION * path.stat().st_size + ROOM_BYTES
    if unpacked > limit:
        raise CheckpointError(
            f"{path}: the zip archive unpacks to {unpacked} bytes; the limit for its size is "
            f"{limit}, and nothing was unpacked. Save the weights uncompressed."
        )


def _open_safetensors(path: Path) -> Container:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return Container(path, tensors, file.metadata() or {})
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise CheckpointError(
            f"{path}: not a readable safetensors file: {error}; {CUT_OFF}"
        ) from error


def _open_npz(path: Path) -> Container:
    try:
        with np.load(path, allow_pickle=False) as file:
            return Container(path, {key: torch.from_numpy(file[key]) for key in file.files})
    except Exception as error:  # the parsers of damaged members raise many types
        raise CheckpointError(f"{path}: not a readable npz file: {error}") from error


def _open_onnx(path: Path) -> Container:
    try:
        graph = onnx.load(path, load_external_data=False).graph
        tensors = {
            item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy())
            for item in graph.initializer
        }
    except Exception as error:  # protobuf's and onnx's errors share no base class
        raise CheckpointError(f"{path}: not a readable ONNX file: {error}") from error
    return Container(path, tensors, graph=graph)


def _open_torch(path: Path) -> Container:
    if is_torchscript(path):
        return Container(path, read_torchscript(path))
    try:
        with torch.serialization.safe_globals(ALLOWED_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            if not file.read(2).startswith((b"PK", b"\x80")):  # a zip archive, a pickle
                raise CheckpointError(
                    f"{path}: not a checkpoint: neither safetensors, nor npz, ONNX or a torch file"
                ) from error
        raise CheckpointError(
            f"{path}: holds Python objects other than tensors and plain values; loading those "
            "could run code. Save its state dict alone, preferably as .safetensors."
        ) from error
    except Exception as error:  # torch's own unpickler raises many types
        raise CheckpointError(f"{path}: not a readable torch file: {error}; {CUT_OFF}") from error
    tensors, wrapper = _find_state_dict(path, content)
    entries = content if wrapper else {}
    sets = {
        str(name): _unwrapped(value) for name, value in entries.items() if _is_state_dict(value)
    }
    beside = {
        str(name): _plain(v)
        for name, v in entries.items()
        if str(name) not in sets and str(name) not in TRAINING_ENTRIES
    }
    return Container(path, tensors, wrapper=wrapper, sets=sets, beside=beside)


def _plain(value: Any) -> Any:
    """A training script's entry as plain values; None for what is neither those nor arguments."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float) else None


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(
        isinstance(item, Tensor) and item.nbytes <= item.untyped_storage().nbytes()
        for item in value.values()
    )


def _unwrapped(state_dict: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that data-parallel training and `torch.compile` add."""
    named = {}
    for key, value in state_dict.items():
        name = str(key)
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        named[name] = value
    return named


def _find_state_dict(path: Path, content: Any) -> tuple[dict[str, Tensor], str]:
    """The weights of a torch file's content, and the key that they were nested under."""
    wrapper = ""
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content, wrapper = content[name], wrapper or name
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path}: holds no state dict, under none of the keys {', '.join(WRAPPERS)}"
        )
    for key, value in content.items():
        if isinstance(value, Tensor) and value.nbytes > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: the tensor {key} claims more numbers than the file holds"
            )
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path}: entries are not tensors: {', '.join(others[:10])}")
    return _unwrapped(content), wrapper
