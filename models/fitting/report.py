"""A fit's report as files: JSON, and plots of the learning curve and the confusion matrix."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json`, `curve.png` and `confusion.png`. The folder is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _curve(report).savefig(folder / "curve.png", dpi=120)
    _confusion(report).savefig(folder / "confusion.png", dpi=120)


def _curve(report: Mapping[str, Any]) -> "Figure":
    curve = report["curve"]
    epochs = [point["epoch"] for point in curve]
    from matplotlib.figure import Figure  # here, because it takes a tenth of a worker's start

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(epochs, [point[f"train_{what}"] for point in curve], label="training")
        axes.plot(epochs, [point[f"holdout_{what}"] for point in curve], label="holdout")
        axes.axvline(report["best_epoch"], color="grey", linestyle=":", label="best epoch")
        axes.set_xlabel("epoch")
        axes.set_ylabel(what)
        axes.legend()
    return figure


def _confusion(report: Mapping[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    labels, counts = report["labels"], report["confusion"]
    side = min(20.0, 3 + 0.35 * len(labels))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues")
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("actual")
    accuracy, images = report["holdout_accuracy"], report["holdout_images"]
    axes.set_title(f"{accuracy:.1%} of {images} held-out images")
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            if count and len(labels) <= 50:
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8)
    return figure
