"""VQT against a linear probe on real images: `python -m benchmarks.stamps [FOLDER]`.

FOLDER holds Tux Paint's stamps (Debian's tuxpaint-stamps-default, /usr/share/tuxpaint/stamps):
photographs and drawings of everyday things, sorted into folders. Classes are all folders with at
least eight images but those of symbols; cartoons count to the folder above theirs.

For each seed a quarter of each class is set aside; heads are fitted on the rest with the same
options, which hold out a share of their own to stop by, and are then asked about what was set
aside, by the head that a server would use. `--save FILE` also fits the demo's head, on all images.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from models import Registry
from models.fitting.examples import Example, split
from models.fitting.features import ReadFeatures
from models.fitting.fit import Fitted, fit, run_directly
from models.fitting.options import FitOptions
from models.heads.files import save_head
from models.heads.registry import create_head
from models.inference import Row
from models.model import Model
from models.trunks.base import Trunk

LEAST = 8
WAYS = {
    "linear": FitOptions(kind="linear"),
    "linear, 4 blocks": FitOptions(kind="linear", layers=4),
    "linear, 12 blocks": FitOptions(kind="linear", layers=12),
    "VQT, 1 query": FitOptions(kind="vqt"),
    "VQT, 4 queries": FitOptions(kind="vqt", queries=4),
    "VQT, 1 query, half kept": FitOptions(kind="vqt", keep=0.5),
}


def stamps(root: Path) -> list[Example]:
    found = []
    for path in sorted(root.rglob("*.png")):
        folders = [name for name in path.relative_to(root).parts[:-1] if name != "cartoon"]
        if folders[0] != "symbols":
            found.append(Example(str(path.relative_to(root)), folders[-1], path))
    counts = Counter(example.label for example in found)
    return [example for example in found if counts[example.label] >= LEAST]


class Passes:
    """The trunk's passes, each image's once: all fits read the same features."""

    def __init__(self, trunk: Trunk) -> None:
        self._run = run_directly(trunk)
        self._rows: dict[str, Row] = {}

    def __call__(self, pixels_BCHW: Tensor, head: ReadFeatures) -> list[Row]:
        request = head.request
        what = f"{request.keys_values} {sorted(request.layers)}"
        keys = [what + hashlib.sha256(image.numpy()).hexdigest() for image in pixels_BCHW]
        new = [i for i, key in enumerate(keys) if key not in self._rows]
        if new:
            for i, row in zip(new, self._run(pixels_BCHW[new], head), strict=True):
                self._rows[keys[i]] = {
                    name: array.astype(np.float16) if name == "keys_values" else array
                    for name, array in row.items()
                }
        return [dict(self._rows[key]) for key in keys]


def fitted(
    examples: Sequence[Example],
    trunk: Trunk,
    name: str,
    options: FitOptions,
    passes: Passes,
    source: str = "",
) -> Fitted:
    with tempfile.TemporaryDirectory() as folder:
        return fit(
            examples,
            trunk,
            name,
            options,
            Path(folder),
            run=passes,
            progress=lambda step: None,
            trunk_source=source,
        )


def accuracy(result: Fitted, trunk: Trunk, examples: Sequence[Example]) -> float:
    file = result.head
    model = Model("fitted", trunk, create_head(file.kind, trunk, file.labels, file.state))
    right = 0
    for start in range(0, len(examples), 16):
        some = examples[start : start + 16]
        answers = model.predict([example.read() for example in some], top_k=1)
        right += sum(
            answer["predictions"][0]["label"] == example.label
            for answer, example in zip(answers, some, strict=True)
        )
    return right / len(examples)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default="/usr/share/tuxpaint/stamps")
    parser.add_argument("--model", default="dinov2-focus-embed", help="a model on the trunk")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", default=",".join(map(str, range(len(WAYS)))))
    parser.add_argument("--set", default="{}", help="options for all ways, as JSON")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    examples = stamps(given.folder)
    if not examples:
        raise SystemExit(f"no stamps in {given.folder}; apt-get install tuxpaint-stamps-default")
    registry = Registry.from_catalog("demo")
    trunk = registry.get(given.model).trunk
    name = registry.catalog.models[given.model].trunk
    passes = Passes(trunk)
    labels = [example.label for example in examples]
    print(f"{name}: {len(examples)} images, {len(set(labels))} classes")
    chosen = [list(WAYS.items())[int(i)] for i in given.ways.split(",")]
    for way, options in chosen:
        found = []
        for seed in range(given.seeds):
            learn, aside = split(labels, 0.25, seed + 1000)
            wanted = FitOptions(**{**_plain(options), "seed": seed, **json.loads(given.set)})
            result = fitted([examples[i] for i in learn], trunk, name, wanted, passes)
            found.append(accuracy(result, trunk, [examples[i] for i in aside]))
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        each = " ".join(f"{value:.3f}" for value in found)
        print(f"{way:>22}: {statistics.mean(found):.3f} +- {spread:.3f}  ({each})", flush=True)
    if given.save:
        source = registry.catalog.trunks[name].source
        result = fitted(examples, trunk, name, FitOptions(), passes, source)
        save_head(result.head, given.save)


def _plain(options: FitOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in FitOptions.__dataclass_fields__}


if __name__ == "__main__":
    main()
