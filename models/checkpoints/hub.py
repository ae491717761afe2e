"""Repositories of the Hugging Face hub in transformers' layout. timm and open_clip load others."""

import errno
import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from models.errors import SourceError

CONFIG = "config.json"
BESIDE = ("preprocessor_config.json", "processor_config.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def fetch_transformers(location: str) -> Path | None:
    """The weights of a repository, with its configurations beside them, in the hub's own cache.

    Args:
        location: `ORGANISATION/NAME`, with `@REVISION` or without.

    Returns:
        None: the repository is not in transformers' layout, or cannot be reached.

    Raises:
        SourceError: a file of it cannot be downloaded, such as its weights.
        OSError: the disk is full.
    """
    name, _, revision = location.partition("@")
    try:
        config = Path(hf_hub_download(name, CONFIG, revision=revision or None))
        content = json.loads(config.read_text("utf-8"))
    except Exception:  # of many kinds; what loads other repositories says what is wrong
        return None
    # timm's configurations have an architecture
    if not isinstance(content, dict) or "model_type" not in content or "architecture" in content:
        return None
    for file in BESIDE:
        _download(name, file, revision)
    for file in WEIGHTS:
        if (path := _download(name, file, revision)) is not None:
            return path
    raise SourceError(
        f"hf-hub:{location}: neither {' nor '.join(WEIGHTS)} could be downloaded; sharded weights "
        "are not supported"
    )


def _download(name: str, file: str, revision: str) -> Path | None:
    """A file of a repository; None if it has no such file, or neither it nor the hub is there."""
    try:
        return Path(hf_hub_download(name, file, revision=revision or None))
    except EntryNotFoundError:
        return None
    except Exception as error:  # of many kinds
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise SourceError(f"hf-hub:{name}: {file} could not be downloaded: {error}") from error
