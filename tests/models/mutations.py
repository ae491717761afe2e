"""Changed checkpoints: damaged, relabelled and mixed files, and other arguments."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = tuple[str, Any]  # what was changed, and the result
# The last four mean something where a number or a truth value is expected.
NONSENSE: tuple[Any, ...] = ("many", None, [1, 2], [], {"a": 1}, float("nan"), -3, 0, 1.5, True)
ARCHITECTURES = ("vit_tiny_patch16_224", "resnet50", "ViT-B-32", "no_such_network", 7)
FLAT = (".npz", ".safetensors")  # files that hold tensors by name, and nothing nested
WRAPPERS = ("", "model", "state_dict", "teacher", "module")
PREFIXES = ("module.", "backbone.", "encoder.", "model.")


def read_content(path: Path) -> Any:
    """What a file holds: its tensors by name, or whatever a torch file nests."""
    match path.suffix:
        case ".npz":
            with np.load(path) as file:
                return {key: torch.from_numpy(file[key]) for key in file.files}
        case ".safetensors":
            return load_file(path)
        case _:
            return torch.load(path, weights_only=False)


def write_content(path: Path, content: Any) -> None:
    match path.suffix:
        case ".npz":
            np.savez(path, **{key: value.numpy() for key, value in content.items()})
        case ".safetensors":
            save_file({key: value.contiguous() for key, value in content.items()}, path)
        case _:
            torch.save(content, path)


def is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(item, Tensor) for item in value.values())
    )


def state_dicts(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of the state dicts in nested content."""
    if is_state_dict(content):
        yield place
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if not str(key).startswith("optim"):
                yield from state_dicts(value, (*place, key))


def at(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        content = content[key]
    return content


def with_state(content: Any, place: tuple[Any, ...], state: Mapping[str, Tensor]) -> Any:
    """The content with another state dict at a place; tensors are shared."""
    if not place:
        return dict(state)
    return {**content, place[0]: with_state(content[place[0]], place[1:], state)}


def changed_tensors(name: str, value: Tensor) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A tensor gone, under another name, or of another shape or type."""
    yield "dropped", {}
    yield "renamed", {f"{name}_": value}
    yield "moved", {f"x.{name}": value}
    if value.dim() > 1 and value.shape[0] != value.shape[1]:
        yield "transposed", {name: value.transpose(0, 1).contiguous()}
    if value.dim() and len(value) > 1:
        yield "shortened", {name: value[:-1].clone()}
        yield "doubled", {name: torch.cat([value, value])}
    if value.dim() > 1 and value.shape[-1] > 1:
        yield "narrowed", {name: value[..., :-1].clone()}
    yield "flattened", {name: value.flatten()} if value.dim() != 1 else {name: value[None].clone()}
    if value.is_floating_point():
        yield "integers", {name: value.to(torch.int8)}


def changed_files(content: Any, random: Random, count: int) -> Iterator[Change]:
    """Content with one change each: `count` tensors of each state dict in every way, and all."""
    for place in state_dicts(content):
        state = at(content, place)
        keys = list(state)
        for key in random.sample(keys, min(count, len(keys))):
            for how, instead in changed_tensors(key, state[key]):
                others = {k: v for k, v in state.items() if k != key}
                yield f"{place} {key} {how}", with_state(content, place, others | instead)
        yield f"{place} more", with_state(content, place, {**state, "extra.weight": torch.ones(3)})
        for prefix in PREFIXES:
            renamed = {f"{prefix}{k}": v for k, v in state.items()}
            yield f"{place} below {prefix}", with_state(content, place, renamed)


def rewrapped_files(content: Any) -> Iterator[Change]:
    """The only state dict of a file below another key, or below none."""
    places = list(state_dicts(content))
    if len(places) == 1:
        state = dict(at(content, places[0]))
        for wrapper in WRAPPERS:
            yield f"in {wrapper!r}", {wrapper: state} if wrapper else state


def mixed_files(content: Any, others: Mapping[str, Any]) -> Iterator[Change]:
    """Content with another file's tensors added to one of its state dicts."""
    for place in state_dicts(content):
        state = at(content, place)
        for name, other in others.items():
            for theirs in state_dicts(other):
                yield (
                    f"{place} with {name}",
                    with_state(content, place, {**at(other, theirs), **state}),
                )


def changed_settings(content: Any) -> Iterator[Change]:
    """Torch content without one of its entries, or of the script's arguments in it."""
    if not isinstance(content, Mapping) or is_state_dict(content):
        return
    for key, value in content.items():
        yield f"without {key}", {k: v for k, v in content.items() if k != key}
        inner = vars(value) if isinstance(value, Namespace) else value
        if not isinstance(inner, Mapping) or is_state_dict(inner) or str(key).startswith("optim"):
            continue
        for name in inner:
            left = {k: v for k, v in inner.items() if k != name}
            other = Namespace(**left) if isinstance(value, Namespace) else left
            yield f"without {key}.{name}", {**content, key: other}


def dropped_arguments(arguments: Mapping[str, Any]) -> Iterator[Change]:
    """Arguments without one of them, or of the tables in them."""
    for key, value in arguments.items():
        yield f"without {key}", {k: v for k, v in arguments.items() if k != key}
        if isinstance(value, Mapping):
            for how, inner in dropped_arguments(value):
                yield f"{key}: {how}", {**arguments, key: inner}


def nonsense_arguments(arguments: Mapping[str, Any]) -> Iterator[Change]:
    """Arguments with a value that makes no sense, also in tables."""
    for key, value in arguments.items():
        for other in NONSENSE[:-4] if isinstance(value, bool | float) else NONSENSE:
            yield f"{key} = {other!r}", {**arguments, key: other}
        if isinstance(value, Mapping):
            for how, inner in nonsense_arguments(value):
                yield f"{key}: {how}", {**arguments, key: inner}


def other_numbers(arguments: Mapping[str, Any]) -> Iterator[Change]:
    """Arguments with another whole number, or list of them."""
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            for how, inner in other_numbers(value):
                yield f"{key}: {how}", {**arguments, key: inner}
        elif isinstance(value, bool):
            yield f"{key} = {not value}", {**arguments, key: not value}
        elif isinstance(value, int | float) and value:
            for other in (value * 2, value + 1):
                yield f"{key} = {other}", {**arguments, key: other}
        elif isinstance(value, list) and value and isinstance(value[0], int):
            yield f"{key} + 1", {**arguments, key: [each + 1 for each in value]}
            yield f"{key} longer", {**arguments, key: [*value, value[-1]]}
            yield f"{key} shorter", {**arguments, key: value[:-1]}
