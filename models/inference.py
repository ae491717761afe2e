"""One pass for many heads: the core that the library, the worker and fitting share.

pieces = prepare_pieces(image, trunk, head.view, limits)
rows = run_pass(trunk, trunk.collate(pieces), [[call]] * len(pieces))
arrays = finish(head, [row for [row] in rows], options, image, limits)
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import InputError
from models.heads.base import Head
from models.inputs.images import ImageLimits, ReducedImage, decode_image, decode_reduced
from models.inputs.tiling import View
from models.inputs.types import Input
from models.started_pass import Places, Row, StartedPass
from models.trunks.base import Trunk
from models.trunks.device_errors import is_cuda_error, is_out_of_memory
from models.trunks.devices import one_thread
from models.trunks.features import FeatureRequest, merge
from models.trunks.output import TrunkOutput

# Rows of heads that compute together, which bounds the memory of their features.
MAX_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class HeadCall:
    """A head with the options of its `forward`. Rows with equal calls share one.

    Args:
        is_ranked: whether its logits are ranked on the device. Else its rows are what `forward`
            returns.
        top_k: how many of the best classes a row has then, or more.
    """

    head: Head
    options: tuple[tuple[str, Any], ...] = ()
    is_ranked: bool = False
    top_k: int = field(default=0, compare=False)

    @classmethod
    def of(cls, head: Head, options: Mapping[str, Any]) -> "HeadCall":
        """The call for a request's options; those for `finish` are left out."""
        forward = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
            if name in head.forward_options
        }
        top_k = head.top_k(options)
        return cls(head, tuple(sorted(forward.items())), top_k > 0, top_k)

    @property
    def request(self) -> FeatureRequest:
        """What it needs of a pass."""
        request = self.head.feature_request(dict(self.options))
        adapter = self.head.request.adapter
        return request if adapter is None else replace(request, adapter=adapter)

    def at_size(self, size: tuple[int, int]) -> "HeadCall":
        """The call for an image of that (width, height)."""
        options = self.head.at_size(dict(self.options), size)
        return replace(self, options=tuple(sorted(options.items())))


def finish_options(head: Head, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a request that go to the head's `finish`."""
    return {k: v for k, v in options.items() if k not in head.forward_options}


def decode(item: Input | Image.Image, limits: ImageLimits, min_side: int | None = None) -> Any:
    """An encoded image as an RGB image; every other input unchanged.

    Args:
        min_side: return a `ReducedImage` whose shorter side has at least that many pixels, where
            the image has. None: the whole image.

    Raises:
        InputError: it cannot be decoded, or is over a limit.
    """
    if not isinstance(item, bytes):
        return item
    if min_side is None:
        return decode_image(item, limits)
    return decode_reduced(item, limits, min_side)


def least_side(needs: Sequence[tuple[Trunk, View | None]]) -> int | None:
    """The `min_side` to decode an image with for several passes; None if one needs all pixels."""
    sides = [None if view is not None else trunk.min_side for trunk, view in needs]
    if not sides or None in sides:
        return None
    return max(side for side in sides if side is not None)


def image_size(item: Any) -> tuple[int, int]:
    """The full (width, height) of a decoded image or of `pixel_values`; (0, 0) for other inputs."""
    if isinstance(item, Image.Image | ReducedImage):
        return item.size
    if isinstance(item, np.ndarray):
        return item.shape[2], item.shape[1]
    return 0, 0


def prepare_pieces(item: Any, trunk: Trunk, view: View | None, limits: ImageLimits) -> list[Tensor]:
    """A decoded input as the trunk takes it: one tensor, or one for each piece of the view.

    Raises:
        InputError: not an input of this trunk.
    """
    if view is None or not isinstance(item, Image.Image):
        return [trunk.prepare(item, limits)]
    return view.cut(item)


@torch.inference_mode()
def start_pass(trunk: Trunk, batch: Tensor, calls: Sequence[Sequence[HeadCall]]) -> StartedPass:
    """Start the trunk once, then each head on the rows that call it.

    Args:
        batch: as `trunk.collate` returns it.
        calls: for each row of the batch its head calls.

    Raises:
        Exception: what the trunk raises, and errors of the device.
    """
    places: dict[HeadCall, list[tuple[int, int]]] = defaultdict(list)
    for row, row_calls in enumerate(calls):
        for position, call in enumerate(row_calls):
            places[call].append((row, position))
    output = trunk.forward(
        batch, merge((call.request, [row for row, _ in at]) for call, at in places.items())
    )
    started = StartedPass([[call.top_k for call in row_calls] for row_calls in calls])
    for group in _groups(places):
        _start_heads(started, output, group)
    with one_thread():
        started.rank()
    if not places:  # a probe: something to wait for, so that a failure of the device shows
        started.tensors.append(output.features.flatten()[:1].float())
    return started


def _groups(places: Mapping[HeadCall, Places]) -> list[dict[HeadCall, Places]]:
    """The calls of a batch, those together whose heads compute together. Several calls in a group
    have at most MAX_TOGETHER rows."""
    groups: list[dict[HeadCall, Places]] = []
    latest: dict[Hashable, dict[HeadCall, Places]] = {}
    for call, at in places.items():
        key: Hashable = call
        if call.is_ranked and call.head.shared is not None:
            key = call.head.shared, call.options
        group = latest.get(key)
        if group is None or sum(map(len, group.values())) + len(at) > MAX_TOGETHER:
            group = latest[key] = {}
            groups.append(group)
        group[call] = at
    return groups


def _start_heads(
    started: StartedPass, output: TrunkOutput, places: Mapping[HeadCall, Places]
) -> None:
    """Start heads that compute together; one by one if that fails, so that only the head at fault
    fails."""
    if len(places) == 1:
        [(call, at)] = places.items()
        _start_head(started, output, call, at)
        return
    try:
        parts = _forward_together(output, places, started.top_k(places.values()))
    except Exception as error:
        if is_out_of_memory(error) or is_cuda_error(error):  # not the heads' fault
            raise
        for call, at in places.items():
            _start_head(started, output, call, at)
    else:
        own = list(places.values())
        for numbers, tensors in parts:
            at = [place for number in numbers for place in own[number]]
            started.add(at, tensors, is_ranked="logits" in tensors)


def _start_head(started: StartedPass, output: TrunkOutput, call: HeadCall, at: Places) -> None:
    """Start a head on its rows, or note that it fails."""
    rows = output.rows([row for row, _ in at])
    try:
        with nullcontext() if call.head.forward_is_slow else one_thread():
            outputs = call.head.forward(rows, **dict(call.options))
        started.add(at, outputs, is_ranked=call.is_ranked)
    except Exception as error:
        if is_out_of_memory(error) or is_cuda_error(error):  # not the head's fault
            raise
        started.fail(at, error)


def _forward_together(
    output: TrunkOutput, places: Mapping[HeadCall, Places], best: int
) -> Sequence[tuple[Sequence[int], Mapping[str, Tensor]]]:
    """What heads that compute together return, see `Head.forward_together`."""
    heads = [call.head for call in places]
    distinct = sorted({row for at in places.values() for row, _ in at})
    number = {row: position for position, row in enumerate(distinct)}
    index = [[number[row] for row, _ in at] for at in places.values()]
    with one_thread():
        return heads[0].forward_together(heads, output.rows(distinct), index, best)


def run_pass(
    trunk: Trunk, batch: Tensor, calls: Sequence[Sequence[HeadCall]]
) -> list[list[Row | Exception]]:
    """Run the trunk once, then each head on the rows that call it; see `start_pass`.

    Returns:
        For each row, for each of its calls, the head's arrays, or the exception that it raised.
    """
    started = start_pass(trunk, batch, calls)
    return started.results([tensor.cpu() for tensor in started.tensors])


def run_rows(trunk: Trunk, batch: Tensor, call: HeadCall) -> list[Row]:
    """One head's arrays for every row of a batch; its exception is raised."""
    rows: list[Row] = []
    for [row] in run_pass(trunk, batch, [[call]] * len(batch)):
        if isinstance(row, Exception):
            raise row
        rows.append(row)
    return rows


def finish(
    head: Head,
    rows: Sequence[Row],
    options: Mapping[str, Any],
    item: Input | Image.Image,
    size: tuple[int, int],
    limits: ImageLimits,
) -> dict[str, np.ndarray]:
    """A head's answer for one input.

    Args:
        rows: what `forward` returned for each piece of the input.
        options: those of `finish`.
        item: the input, encoded or decoded.
        size: the image's (width, height).

    Raises:
        InputError: an option that needs an image, of an input that is not one.
    """
    is_image = isinstance(item, bytes | Image.Image)
    if head.needs_image(options):
        if not is_image:
            raise InputError("an overlay needs an encoded image", field="output")
        # encoded images are decoded again instead of being kept while they wait
        options = {**options, "image": decode(item, limits)}
    row = head.view.merge(rows, size) if head.view is not None and is_image else rows[0]
    return head.finish(row, size, **options)
