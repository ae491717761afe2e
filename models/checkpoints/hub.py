"""Repositories of the Hugging Face hub in transformers' layout. timm and open_clip load others."""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

CONFIG = "config.json"
BESIDE = ("preprocessor_config.json",)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def fetch_transformers(location: str) -> Path | None:
    """The weights of a repository, with its configurations beside them, in the hub's own cache.

    Args:
        location: `ORGANISATION/NAME`, with `@REVISION` or without.

    Returns:
        None: the repository is not in transformers' layout, or cannot be reached.
    """
    name, _, revision = location.partition("@")

    def download(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, revision=revision or None))
        except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
            return None

    config = download(CONFIG)
    if config is None:
        return None
    try:
        content = json.loads(config.read_text("utf-8"))
    except ValueError:
        return None
    # timm's configurations have an architecture
    if not isinstance(content, dict) or "model_type" not in content or "architecture" in content:
        return None
    for file in BESIDE:
        download(file)
    return next((path for path in map(download, WEIGHTS) if path is not None), None)
