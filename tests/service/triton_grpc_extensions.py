"""What `test_triton.py` asks with tritonclient over gRPC; ADDRESS IMAGE KEY HANDLE.

A process of its own, as `triton_grpc.py` says. Prints what it saw as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc as triton

from tests.service import triton_shared_memory


def main(address: str, path: str, key: str, handle: str) -> dict[str, Any]:
    shared = triton_shared_memory.load()
    client = triton.InferenceServerClient(address)
    image = Path(path).read_bytes()
    encoded = np.frombuffer(image, np.uint8)[None]
    plain = triton.InferInput("image", encoded.shape, "UINT8")
    plain.set_data_from_numpy(encoded)
    outputs = [triton.InferRequestedOutput("embedding")]
    packed = client.infer(
        "tiny-embed", [plain], outputs=outputs, priority=2, compression_algorithm="gzip"
    )

    region = shared.create_shared_memory_region("in", key, encoded.nbytes)
    shared.set_shared_memory_region(region, [encoded])
    client.register_system_shared_memory("in", key, encoded.nbytes)
    result = shared.create_shared_memory_region("out", f"{key}_out", 4096)
    client.register_system_shared_memory("out", f"{key}_out", 4096)
    there = triton.InferInput("image", encoded.shape, "UINT8")
    there.set_shared_memory("in", encoded.nbytes)
    wanted = triton.InferRequestedOutput("embedding")
    wanted.set_shared_memory("out", 4096)
    beside = triton.InferRequestedOutput("tokens")
    answer = client.infer("tiny-embed", [there], outputs=[wanted, beside])
    output = answer.get_output("embedding")
    read = shared.get_contents_as_numpy(result, np.float32, output.shape)
    seen = {
        "embedding": packed.as_numpy("embedding").tolist(),
        "shared": read.tolist(),
        "beside": list(answer.as_numpy("tokens").shape),
        "regions": sorted(client.get_system_shared_memory_status().regions),
        "cuda": _cuda(client, there, handle),
        "config": client.get_model_config("tiny", as_json=True)["config"],
        "statistics": client.get_inference_statistics("tiny-embed", as_json=True),
    }
    client.unregister_system_shared_memory()
    seen["after"] = sorted(client.get_system_shared_memory_status().regions)
    for each in (region, result):
        shared.destroy_shared_memory_region(each)
    return seen


def _cuda(client: Any, image: Any, handle: str) -> dict[str, Any]:
    """The regions of a device's memory before and after an output was written there."""

    def regions() -> dict[str, list[int]]:
        found = client.get_cuda_shared_memory_status().regions
        return {name: [each.device_id, each.byte_size] for name, each in found.items()}

    client.register_cuda_shared_memory("gpu", handle, 0, 8192)
    wanted = triton.InferRequestedOutput("embedding")
    wanted.set_shared_memory("gpu", 8192)
    client.infer("tiny-embed", [image], outputs=[wanted])
    before = regions()
    client.unregister_cuda_shared_memory()
    return {"regions": before, "after": regions()}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
