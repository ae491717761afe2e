"""Files of trained heads: safetensors, with the trunk that each is for in the metadata."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as save_bytes
from torch import Tensor, isfinite

from models.checkpoints.checkpoint import HeadState
from models.errors import CheckpointError
from models.heads.lora import LORA
from models.heads.lora import TASKS as LORA_TASKS
from models.heads.registry import head_classes

METADATA_KEY = "vitrail-head"
VERSION = 1
MAX_LABELS = 100_000
MAX_METADATA_BYTES = 16 * 2**20
PIN = "sha256="


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFile:
    """A trained head, and the trunk that it is for.

    Args:
        trunk: the trunk's name where the head was trained.
        trunk_digest: the digest of the trunk's weights.
        preprocess_digest: the digest of the trunk's preprocessing.
        labels: the classes' names.
        trunk_source: the trunk's source. If it pins its bytes by a hash, an equal source replaces
            an equal digest, since a conversion may round differently on another machine.
        training: a summary of the training, as plain values.
    """

    kind: str
    trunk: str
    trunk_digest: str
    preprocess_digest: str
    labels: tuple[str, ...]
    state: HeadState
    task: str = "classify"
    trunk_source: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)

    def check_trunk(self, trunk_digest: str, preprocess_digest: str, source: str = "") -> None:
        """Check that the head was trained on this trunk and preprocessing.

        Raises:
            CheckpointError: it was trained on another one.
        """
        pinned = PIN in source and source == self.trunk_source
        for what, expected, actual in (
            ("trunk", self.trunk_digest, self.trunk_digest if pinned else trunk_digest),
            ("preprocessing", self.preprocess_digest, preprocess_digest),
        ):
            if expected != actual:
                raise CheckpointError(
                    f"the head was made for another {what} ({expected[:19]}..., of "
                    f"{self.trunk!r}), "
                    f"not for this one ({actual[:19]}...)"
                )


def encode_head(head: HeadFile) -> bytes:
    """The bytes of a head's file."""
    tensors = {key: value.contiguous().cpu() for key, value in head.state.tensors.items()}
    return save_bytes(tensors, metadata={METADATA_KEY: json.dumps(_metadata(head))})


def save_head(head: HeadFile, path: Path) -> None:
    """Write a head's file atomically. Its folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encode_head(head))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it is there completely or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as file:
        try:
            os.fchmod(file.fileno(), 0o644)  # so that other users of a shared volume can read it
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read_head(path: Path) -> HeadFile:
    """Read a head's file.

    Raises:
        CheckpointError: missing, damaged, or not a head.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        return decode_head(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def decode_head(content: bytes) -> HeadFile:
    """A head from its file's bytes. Whether it fits its trunk is checked elsewhere.

    Raises:
        CheckpointError: damaged, not a head, or with weights that are not finite.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        if MAX_METADATA_BYTES < size < len(content):
            raise CheckpointError(
                f"the head's metadata has {size} bytes; the limit is {MAX_METADATA_BYTES}"
            )
        tensors = load(content)
        header = json.loads(content[8 : 8 + size])
        metadata = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "null"))
        json.dumps(metadata, ensure_ascii=False).encode()  # as answers are, with labels of it
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the head's metadata is not Unicode text: {error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        # KeyError: a dtype that torch does not have; the message may hold the whole file
        raise CheckpointError(f"not a readable safetensors file: {str(error)[:200]}") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"not a head: its metadata has no entry {METADATA_KEY}")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"a head of version {metadata.get('version')}; version {VERSION} is supported"
        )
    return _checked(metadata, tensors)


def _checked(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> HeadFile:
    texts = ("kind", "trunk", "trunk_digest", "preprocess_digest", "task")
    if wrong := [name for name in texts if not isinstance(metadata.get(name), str)]:
        raise CheckpointError(f"missing in the head's metadata: {', '.join(wrong)}")
    tasks = {kind: head.task for kind, head in head_classes().items() if head.is_portable}
    is_lora = metadata["kind"] == LORA and metadata["task"] in LORA_TASKS
    if not is_lora and tasks.get(metadata["kind"]) != metadata["task"]:
        supported = ", ".join(f"{kind} for {task}" for kind, task in tasks.items())
        raise CheckpointError(
            f"a {metadata['kind']!r} head for the task {metadata['task']!r}; supported: {supported}"
        )
    labels = metadata.get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError("the head's metadata has no labels")
    fewest = 0 if metadata["task"] == "embed" else 1
    if not fewest <= len(labels) <= MAX_LABELS:
        raise CheckpointError(f"the head has {len(labels)} labels; it can have 1 to {MAX_LABELS}")
    for part in ("settings", "training"):
        if not isinstance(metadata.get(part, {}), dict):
            raise CheckpointError(f"the head's {part} must be an object")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:  # its shape may say any size without a byte of content
            raise CheckpointError(f"the head's {name} is empty: {list(tensor.shape)}")
        if tensor.is_floating_point() and not bool(isfinite(tensor).all()):
            raise CheckpointError(f"the head's {name} has values that are not finite")
    return HeadFile(
        **{name: metadata[name] for name in texts},
        labels=tuple(labels),
        state=HeadState(tensors, metadata.get("settings", {})),
        trunk_source=str(metadata.get("trunk_source", "")),
        training=metadata.get("training", {}),
    )


def _metadata(head: HeadFile) -> dict[str, Any]:
    names = ("kind", "trunk", "trunk_digest", "preprocess_digest", "task")
    return {
        "version": VERSION,
        **{name: getattr(head, name) for name in names},
        "trunk_source": head.trunk_source,
        "labels": list(head.labels),
        "settings": dict(head.state.settings),
        "training": dict(head.training),
    }
