"""VQT compared with linear probes on real images: `python -m benchmarks.stamps [FOLDER]`.

FOLDER has Tux Paint's stamps (Debian's tuxpaint-stamps-default, /usr/share/tuxpaint/stamps):
photographs and drawings of everyday things, sorted into folders. The classes are the folders with
at least eight images, without symbols. Cartoons belong to the class of their parent folder.

For each seed, a quarter of each class is the test set. Heads are fitted to the rest, of which they
hold out a share to decide when to stop, and then classify the test set as a server would. `--save
FILE` also fits the demo's head, to all images.
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
from models.model import Model
from models.started_pass import Row
from models.trunks.base import Trunk

MIN_IMAGES = 8
VARIANTS = {
    "linear": FitOptions(kind="linear"),
    "linear, 4 blocks": FitOptions(kind="linear", layers=4),
    "linear, 12 blocks": FitOptions(kind="linear", layers=12),
    "VQT, 1 query": FitOptions(kind="vqt"),
    "VQT, 4 queries": FitOptions(kind="vqt", queries=4),
    "VQT, 1 query, half kept": FitOptions(kind="vqt", keep=0.5),
}


def stamps(root: Path) -> list[Example]:
    """The stamps of all classes that have enough images."""
    examples = []
    for path in sorted(root.rglob("*.png")):
        folders = [name for name in path.relative_to(root).parts[:-1] if name != "cartoon"]
        if folders[0] != "symbols":
            examples.append(Example(str(path.relative_to(root)), folders[-1], path))
    counts = Counter(example.label for example in examples)
    return [example for example in examples if counts[example.label] >= MIN_IMAGES]


class Passes:
    """Runs the trunk's passes, and caches each image's features for all fits."""

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
    """Fit a head in a temporary folder."""
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
    """The share of examples that a fitted head classifies correctly."""
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
    parser.add_argument("--model", default="dinov2-focus-embed", help="a model of the trunk")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", default=",".join(map(str, range(len(VARIANTS)))))
    parser.add_argument("--set", default="{}", help="fit options for all variants, as JSON")
    parser.add_argument("--save", type=Path, help="fit the demo's head and write it here")
    arguments = parser.parse_args()
    examples = stamps(arguments.folder)
    if not examples:
        raise SystemExit(
            f"no stamps in {arguments.folder}; apt-get install tuxpaint-stamps-default"
        )
    registry = Registry.from_catalog("demo")
    trunk = registry.get(arguments.model).trunk
    name = registry.catalog.models[arguments.model].trunk
    passes = Passes(trunk)
    labels = [example.label for example in examples]
    print(f"{name}: {len(examples)} images, {len(set(labels))} classes")
    selected = [list(VARIANTS.items())[int(i)] for i in arguments.variants.split(",")]
    overrides = json.loads(arguments.set)
    for variant, defaults in selected:
        scores = []
        for seed in range(arguments.seeds):
            train, test = split(labels, 0.25, seed + 1000)
            options = FitOptions(**{**_plain(defaults), "seed": seed, **overrides})
            result = fitted([examples[i] for i in train], trunk, name, options, passes)
            scores.append(accuracy(result, trunk, [examples[i] for i in test]))
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        each = " ".join(f"{score:.3f}" for score in scores)
        mean = statistics.mean(scores)
        print(f"{variant:>22}: {mean:.3f} +- {spread:.3f}  ({each})", flush=True)
    if arguments.save:
        source = registry.catalog.trunks[name].source
        result = fitted(examples, trunk, name, FitOptions(), passes, source)
        save_head(result.head, arguments.save)


def _plain(options: FitOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in FitOptions.__dataclass_fields__}


if __name__ == "__main__":
    main()
