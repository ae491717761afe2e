"""Zero-shot accuracy of the demo on drawings: `python -m benchmarks.zero_shot [FOLDER]`.

FOLDER has Tux Paint's stamps (Debian's tuxpaint-stamps-default, /usr/share/tuxpaint/stamps). The
drawings of 23 of its folders are classified, with the folders' plain names as labels.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from models import Registry

FOLDERS = {
    "animals/birds": "bird", "animals/fish": "fish", "animals/insects": "insect",
    "animals/lizards": "lizard", "animals/shellfish": "shellfish", "animals/dinosaur": "dinosaur",
    "plants/flowers": "flower", "plants/trees": "tree", "plants/mushrooms": "mushroom",
    "food/fruit": "fruit", "food/vegetables": "vegetable", "food/dessert": "dessert",
    "food/nuts": "nut", "vehicles/auto": "car", "vehicles/ship": "ship",
    "vehicles/flight": "airplane", "vehicles/locomotive": "train", "vehicles/cycle": "bicycle",
    "hobbies/music": "musical instrument", "clothes/hats": "hat", "household/dishes": "dish",
    "household/tools": "tool", "town/houses": "house",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default="/usr/share/tuxpaint/stamps")
    parser.add_argument("--model", default="lite0-minilm")
    arguments = parser.parse_args()
    labels = list(FOLDERS.values())
    images, truth = [], []
    for folder, label in FOLDERS.items():
        for path in sorted((arguments.folder / folder).rglob("*.png")):
            images.append(Image.open(path))
            truth.append(label)
    if not images:
        raise SystemExit(
            f"no stamps in {arguments.folder}; apt-get install tuxpaint-stamps-default"
        )
    model = Registry.from_catalog("demo").get(arguments.model)
    ranks = []
    for start in range(0, len(images), 32):
        answers = model.predict(images[start : start + 32], labels=labels)
        for answer, label in zip(answers, truth[start : start + 32], strict=True):
            order = [item["label"] for item in answer["predictions"]]
            ranks.append(order.index(label))
    rank = np.array(ranks)
    print(f"{arguments.model}: {len(images)} drawings, chance {1 / len(labels):.1%}")
    print(f"  top-1 {(rank < 1).mean():.1%}, top-3 {(rank < 3).mean():.1%}")


if __name__ == "__main__":
    main()
