"""What `test_open_inference.py` asks with tritonclient over gRPC; ADDRESS IMAGE PIXELS.

A process of its own, since tritonclient's generated messages and ours have the same names.
Prints what it saw as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException


def main(address: str, image: str, pixels: str) -> dict[str, Any]:
    client = triton.InferenceServerClient(address)
    photo = np.array([Path(image).read_bytes()] * 2, dtype=object)
    images = triton.InferInput("image", [2], "BYTES")
    images.set_data_from_numpy(photo)
    outputs = [triton.InferRequestedOutput(name) for name in ("label", "score", "embedding")]
    both = client.infer("tiny", [images], outputs=outputs, request_id="7", parameters={"top_k": 3})
    best = triton.InferRequestedOutput("probabilities", class_count=2)
    classified = client.infer("tiny", [images], outputs=[best])
    array = np.load(pixels)
    tensor = triton.InferInput("pixel_values", array.shape, "FP32")
    tensor.set_data_from_numpy(array)
    prepared = client.infer("tiny-embed", [tensor])
    half = triton.InferInput("pixel_values", array.shape, "FP16")
    half.set_data_from_numpy(array.astype(np.float16))
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("tiny"),
        "server": client.get_server_metadata(as_json=True),
        "model": client.get_model_metadata("tiny", as_json=True),
        "index": client.get_model_repository_index(as_json=True),
        "id": both.get_response().id,
        "label": [[item.decode() for item in row] for row in both.as_numpy("label").tolist()],
        "score": both.as_numpy("score").tolist(),
        "embedding": both.as_numpy("embedding").tolist(),
        "classified": [item.decode() for item in classified.as_numpy("probabilities")[0].tolist()],
        "prepared": prepared.as_numpy("embedding").tolist(),
        "half": client.infer("tiny-embed", [half]).as_numpy("embedding").tolist(),
        "errors": {name: _error(client, *case) for name, case in _wrong(images, array).items()},
        "load": _admin_error(client),
    }


def _wrong(images: Any, array: np.ndarray) -> dict[str, tuple[str, list[Any], list[str]]]:
    shape = triton.InferInput("pixel_values", [1, 3, 8, 8], "FP32")
    shape.set_data_from_numpy(array[:1, :, :8, :8])
    name = triton.InferInput("picture", [2], "BYTES")
    name.set_data_from_numpy(np.array([b"x", b"y"], dtype=object))
    dtype = triton.InferInput("pixel_values", array.shape, "INT32")
    dtype.set_data_from_numpy(array.astype(np.int32))
    return {
        "shape": ("tiny", [shape], []),
        "name": ("tiny", [name], []),
        "dtype": ("tiny", [dtype], []),
        "model": ("none", [images], []),
        "output": ("tiny", [images], ["logit"]),
        "none": ("tiny", [], []),
    }


def _error(client: Any, model: str, inputs: list[Any], outputs: list[str]) -> list[str]:
    try:
        wanted = [triton.InferRequestedOutput(name) for name in outputs]
        client.infer(model, inputs, outputs=wanted or None)
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def _admin_error(client: Any) -> str:
    try:
        client.load_model("conv")
    except InferenceServerException as error:
        return str(error.status())
    client.unload_model("conv", headers={"x-api-key": "boss"})
    client.load_model("conv", headers={"x-api-key": "boss"})
    return "OK"


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
