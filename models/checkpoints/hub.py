"""Repositories of the Hugging Face hub in transformers' layout. timm and open_clip load others."""

import errno
import json
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from models.checkpoints.shards import SUFFIX, read_index
from models.errors import SourceError

CONFIG = "config.json"
BESIDE = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# In the order in which transformers itself looks for them.
WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{SUFFIX}",
)


def fetch_transformers(location: str) -> Path | None:
    """The weights of a repository, or their index, with its configurations and shards beside them,
    in the hub's own cache.

    Args:
        location: `ORGANISATION/NAME`, with `@REVISION` or without.

    Returns:
        None: the repository is not in transformers' layout, or cannot be reached.

    Raises:
        SourceError: a file of it cannot be downloaded, such as its weights.
        CheckpointError: the index of its weights cannot be used.
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
    commit = config.parent.name  # a branch may move before the last file is here
    for file in BESIDE:
        _download(name, file, commit)
    for file in WEIGHTS:
        if (path := _download(name, file, commit)) is None:
            continue
        for shard in read_index(path) if file.endswith(SUFFIX) else ():
            if _download(name, shard, commit) is None:
                raise SourceError(f"hf-hub:{location}: the shard {shard} could not be downloaded")
        return path
    raise SourceError(f"hf-hub:{location}: none of {', '.join(WEIGHTS)} could be downloaded")


def _download(name: str, file: str, commit: str) -> Path | None:
    """A file of a repository; None if it has no such file, or with HF_HUB_OFFLINE the cache.

    Raises:
        SourceError: it cannot be downloaded, or whether there is one cannot be told, since the hub
            cannot be reached.
        OSError: the disk is full.
    """
    try:
        return Path(hf_hub_download(name, file, revision=commit))
    except LocalEntryNotFoundError as error:  # the hub cannot be reached
        known = try_to_load_from_cache(name, file, revision=commit) is not None  # that it has none
        if known or constants.is_offline_mode():
            return None
        raise SourceError(
            f"hf-hub:{name}: {file} could not be downloaded: {error}. With HF_HUB_OFFLINE=1 "
            "what is in the cache is used"
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # of many kinds
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise SourceError(f"hf-hub:{name}: {file} could not be downloaded: {error}") from error
