"""Indices of sharded checkpoints, as transformers writes them: which file has which tensors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from models.errors import CheckpointError

SUFFIX = ".index.json"
MAX_INDEX_BYTES = 2**24
MAX_SHARDS = 1000
SHARD = re.compile(r"[\w-][\w.-]{0,200}\.(safetensors|bin)", re.ASCII)  # names that disks take


def read_index(path: Path) -> Mapping[str, frozenset[str]]:
    """The names of the tensors by the shard, a file beside the index, that has them.

    `total_size` is not read: no shard can claim more memory than its file has bytes.

    Raises:
        CheckpointError: it is not such an index, is larger than 16 MiB, or names more than 1,000
            shards or one that is not a file beside it.
    """
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: an index of more than {MAX_INDEX_BYTES} bytes")
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of shards: {error}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: not an index of shards: it has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{path}: {str(shard)[:100]!r} is not the name of a shard beside it"
            )
        shards.setdefault(shard, set()).add(name)
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(f"{path}: {len(shards)} shards; at most {MAX_SHARDS} are supported")
    return {shard: frozenset(shards[shard]) for shard in sorted(shards)}


def check_shard(path: Path, found: frozenset[str], stated: frozenset[str]) -> None:
    """
    Args:
        found: the names of a shard's tensors.
        stated: those that the index says it has.

    Raises:
        CheckpointError: they differ.
    """
    for names, what in ((stated - found, "lacks"), (found - stated, "also has")):
        if names:
            listed = ", ".join(sorted(names)[:10])
            raise CheckpointError(f"{path}: not what its index says; the shard {what} {listed}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """
    Raises:
        ValueError: a name that comes twice; JSON readers keep the last one.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name comes twice")
    return content
