"""LoRA adapters as peft saves them: `adapter_config.json` and `adapter_model.safetensors`.

https://huggingface.co/docs/peft describes both files. Options that would change what the adapter
computes and that are not applied here are refused by name. Sizes are read from the file's header
and bounded before any tensor is made.
"""

import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from models.archives import count_members
from models.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 256 * 1024
MAX_HEADER_BYTES = 4 * 2**20
MAX_WEIGHT_BYTES = 512 * 2**20
MAX_TENSORS = 8192
MAX_FILES = 1000
MAX_RANK = 512
DTYPES = ("F32", "F16", "BF16")
PREFIX = "base_model.model."
MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# Names of a classifier that was trained beside the adapter (timm's, and transformers').
CLASSIFIERS = {"head", "head.fc", "fc", "classifier"}

# What this module applies, or what matters only in training.
APPLIED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "modules_to_save", "init_lora_weights", "bias",
}  # fmt: skip
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type",
    "peft_version", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config",
    "loftq_config", "runtime_config",
}  # fmt: skip
# Initialisations that leave the base weights as they are; others change them.
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter's matrices by module, and the classifier that was saved with it.

    Args:
        matrices: A (r, in) and B (out, r), float32, B with the scale multiplied in.
        classifier: `weight` (K, D) and perhaps `bias` (K,); empty if none was saved.
        about: the settings, for people.
    """

    matrices: Mapping[str, tuple[Tensor, Tensor]]
    classifier: Mapping[str, Tensor]
    about: Mapping[str, Any]


def read_archive(content: bytes) -> PeftAdapter:
    """An adapter from a zip archive of its two files, which may lie in one folder.

    Raises:
        CheckpointError: not such an archive, over a limit, or not an adapter that is supported.
    """
    limits = {CONFIG: MAX_CONFIG_BYTES, WEIGHTS: MAX_WEIGHT_BYTES}
    files: dict[str, bytes] = {}
    if count_members(content) > MAX_FILES:
        raise CheckpointError(f"the archive has more than {MAX_FILES} files")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for entry in archive.infolist():
                name = entry.filename.rpartition("/")[2]
                if name not in limits:
                    continue
                if name in files:
                    raise CheckpointError(f"the archive has several files {name}")
                if entry.file_size > limits[name]:
                    raise CheckpointError(
                        f"{name} has {entry.file_size} bytes; the limit is {limits[name]}"
                    )
                with archive.open(entry) as file:  # a wrong size in the archive is cut off here
                    files[name] = file.read(limits[name] + 1)[: limits[name]]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise CheckpointError(f"not a readable zip archive: {error}") from error
    except Exception as error:  # zlib's and lzma's own
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the archive is damaged: {error}") from error
    if missing := [name for name in limits if name not in files]:
        raise CheckpointError(f"the archive has no {' and no '.join(missing)}")
    return read_adapter(files[CONFIG], files[WEIGHTS])


def read_adapter(config: bytes, weights: bytes) -> PeftAdapter:
    """An adapter from the contents of its two files.

    Raises:
        CheckpointError: damaged, over a limit, or with an option that is not supported.
    """
    settings = _read_config(config)
    _check_header(weights)
    try:
        tensors = load(weights)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{WEIGHTS}: {error}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{WEIGHTS}: {key} has values that are not finite")
        name = key.removeprefix(PREFIX)
        if (match := MATRIX.fullmatch(name)) is not None:
            halves.setdefault(match[1], {})[match[2]] = tensor.float()
        else:
            saved[name] = tensor.float()
    matrices = {name: _pair(name, pair, settings) for name, pair in halves.items()}
    if not matrices:
        raise CheckpointError(f"{WEIGHTS} has no matrices lora_A and lora_B")
    shown = ("r", "lora_alpha", "use_rslora")
    about = {str(name): settings[name] for name in shown if name in settings}
    return PeftAdapter(matrices, _classifier(saved, settings), about)


def _read_config(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{CONFIG} has {len(content)} bytes; the limit is {MAX_CONFIG_BYTES}")
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG} is not JSON") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{CONFIG} is not a JSON object")
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"peft_type is {settings.get('peft_type')!r}; only LORA is supported")
    if settings.get("bias", "none") != "none":
        raise CheckpointError("bias: adapters that train biases are not supported")
    if settings.get("init_lora_weights", True) not in INITIALISATIONS:
        raise CheckpointError(
            f"init_lora_weights is {settings['init_lora_weights']!r}, which changes the base "
            "weights; have peft convert the adapter (path_initial_model_for_weight_conversion)"
        )
    others = settings.keys() - APPLIED - IGNORED
    if unsupported := sorted(
        name for name in others if settings[name] not in (None, False, [], {})
    ):
        raise CheckpointError(f"not supported: {', '.join(unsupported)[:200]}")
    for name in ("r", "lora_alpha"):
        _check_number(name, settings.get(name))
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{name} is not an object")
        for pattern, value in patterns.items():
            _check_number(f"{name}[{pattern[:50]!r}]", value)
    return settings


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1e6:
        raise CheckpointError(f"{name} is not a number above 0")


def _check_header(content: bytes) -> None:
    """Check the sizes that a safetensors file declares.

    https://huggingface.co/docs/safetensors
    """
    if len(content) > MAX_WEIGHT_BYTES:
        raise CheckpointError(
            f"{WEIGHTS} has {len(content)} bytes; the limit is {MAX_WEIGHT_BYTES}"
        )
    size = int.from_bytes(content[:8], "little")
    if size > min(MAX_HEADER_BYTES, len(content) - 8):
        raise CheckpointError(f"{WEIGHTS} is not a readable safetensors file")
    try:
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        shapes = {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{WEIGHTS} is not a readable safetensors file") from error
    if len(shapes) > MAX_TENSORS:
        raise CheckpointError(f"{WEIGHTS} has {len(shapes)} tensors; the limit is {MAX_TENSORS}")
    for key, (dtype, shape) in shapes.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{key[:200]} is of {str(dtype)[:20]}; it can be {DTYPES}")
        # a size of 0 would allow all others to be anything
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise CheckpointError(f"{key[:200]} has the shape {str(shape)[:50]}")


def _pair(
    name: str, pair: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{name} has lora_{next(iter(pair))} alone")
    down, up = pair["A"], pair["B"]
    if down.dim() != 2 or up.dim() != 2:
        raise CheckpointError(f"{name} is not a linear layer; only those can have adapters")
    rank = int(_by_pattern(name, settings.get("rank_pattern"), settings["r"]))
    if not rank == len(down) == up.shape[1]:
        raise CheckpointError(
            f"{name} has matrices {tuple(down.shape)} and {tuple(up.shape)}, not of rank {rank}"
        )
    if rank > MAX_RANK:
        raise CheckpointError(f"{name} is of rank {rank}; the limit is {MAX_RANK}")
    alpha = float(_by_pattern(name, settings.get("alpha_pattern"), settings["lora_alpha"]))
    return down, up * (alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _by_pattern(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """The value for a module: of the first key that its name ends with, else the default.

    Raises:
        CheckpointError: a key is a regular expression.
    """
    for key, value in (patterns or {}).items():
        plain = key.removeprefix("^")
        if re.fullmatch(r"[\w.]+", plain) is None:
            raise CheckpointError(f"the pattern {key[:50]!r} is not a module's name")
        if name == plain or (plain == key and name.endswith(f".{key}")):
            return value
    return default


def _classifier(saved: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the module in `modules_to_save`, which must be a classifier."""
    named = {key.rpartition(".")[2]: tensor for key, tensor in saved.items()}
    modules = {key.rpartition(".")[0] for key in saved}
    if not modules and not settings.get("modules_to_save"):
        return {}
    if len(modules) != 1 or not modules <= CLASSIFIERS:
        names = ", ".join(sorted(saved))[:200] or "nothing"
        raise CheckpointError(
            f"only a classifier can be saved beside the matrices (modules_to_save), not {names}"
        )
    if not named.keys() <= {"weight", "bias"} or "weight" not in named:
        raise CheckpointError("the saved classifier is not one linear layer")
    return named
