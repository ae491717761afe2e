"""Time and error of decoding and transforming photos: `python -m benchmarks.decoding`.

On one thread, by Pillow and timm's transform, by the exact transform and by the fast one, which
take turns for several rounds. Prints medians, then the fast transform's error against the exact one
in the input's pixels, and in the outputs of the demo's models, which have real weights.
"""

import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform as create_timm_transform
from torch import Tensor

from benchmarks.photos import SIZES, encode, photos
from models import Model, Registry
from models.inference import HeadCall, decode, run_rows
from models.inputs.images import DEFAULT_LIMITS
from models.inputs.transforms import Preprocess, create_transform

MODELS = ("efficientnet-lite0", "efficientnet-lite0-embed", "dinov2-focus-embed")
ROUNDS = 9
TIMED = 4  # photos
EXACT = Preprocess()
FAST = replace(EXACT, transform="fast")

Decoder = Callable[[bytes], Tensor]


def main() -> None:
    torch.set_num_threads(1)
    decoders = {"Pillow": by_pillow(EXACT), "exact": by_ours(EXACT), "fast": by_ours(FAST)}
    registry = Registry.from_catalog("demo", device="cpu")
    for size in SIZES.values():
        jpegs = [encode(photo) for photo in photos(size)]
        for name, milliseconds in measure(decoders, jpegs[:TIMED]).items():
            print(f"{size[0]}x{size[1]}, {name}: {milliseconds:.1f} ms")
        print(f"{size[0]}x{size[1]}, pixels: {pixel_error(EXACT, jpegs)}")
        for name in MODELS:
            print(f"{size[0]}x{size[1]}, {name}: {output_error(registry.get(name), jpegs)}")


def by_pillow(spec: Preprocess) -> Decoder:
    """Pillow's decoder, and timm's transform, which resizes with Pillow."""
    transform = create_timm_transform(
        (3, *spec.input_size), interpolation=spec.interpolation, crop_pct=spec.crop_pct,
        normalize=False,
    )  # fmt: skip

    def work(data: bytes) -> Tensor:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        pixels: Tensor = transform(image.convert("RGB"))
        return pixels

    return work


def by_ours(spec: Preprocess) -> Decoder:
    """The server's decoder, and a transform."""
    transform = create_transform(spec)
    return lambda data: transform(decode(data, DEFAULT_LIMITS, spec.min_side))


def measure(decoders: dict[str, Decoder], jpegs: Sequence[bytes]) -> dict[str, float]:
    """Milliseconds for one photo: medians of rounds in which the decoders take turns."""
    durations: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(ROUNDS):
        for name, work in decoders.items():
            started = time.perf_counter()
            for data in jpegs:
                work(data)
            durations[name].append((time.perf_counter() - started) / len(jpegs))
    return {name: 1000 * statistics.median(times) for name, times in durations.items()}


def pixel_error(spec: Preprocess, jpegs: Sequence[bytes]) -> str:
    exact, fast = prepared(spec, jpegs)
    difference = (exact.int() - fast.int()).abs()
    share = (difference > 0).float().mean()
    mean = difference.float().mean()
    return f"{100 * share:.1f} % differ, by {mean:.3f} on average, at most {difference.max()}"


def output_error(model: Model, jpegs: Sequence[bytes]) -> str:
    """What the fast transform changes in a model's outputs."""
    head, spec = model.heads[model.task], model.trunk.preprocess
    if spec.crop_mode == "letterbox":  # which the fast transform does not have
        spec = replace(spec, crop_mode="center")
    exact, fast = (
        np.stack([next(iter(row.values())) for row in run_rows(model.trunk, batch, HeadCall(head))])
        for batch in prepared(spec, jpegs)
    )
    dots, lengths = (exact * fast).sum(1), np.linalg.norm(exact, axis=1)
    cosine = dots / lengths / np.linalg.norm(fast, axis=1)
    error = np.abs(exact - fast).max() / np.abs(exact).max()
    result = f"largest error {error:.4f} of the largest value, least cosine {cosine.min():.5f}"
    if model.task == "classify":
        result += f", top-1 agrees for {100 * (exact.argmax(1) == fast.argmax(1)).mean():.0f} %"
    return result


def prepared(spec: Preprocess, jpegs: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """All photos by the exact and by the fast transform, (B, 3, H, W) uint8 each."""
    exact, fast = by_ours(spec), by_ours(replace(spec, transform="fast"))
    return torch.stack([exact(data) for data in jpegs]), torch.stack([fast(d) for d in jpegs])


if __name__ == "__main__":
    main()
