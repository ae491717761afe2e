"""What `test_triton.py` asks with tritonclient over gRPC; ADDRESS IMAGE KEY.

A process of its own, as `triton_grpc.py` says. Prints what it saw as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from tests.service import triton_shared_memory


def main(address: str, path: str, key: str) -> dict[str, Any]:
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
        "cuda": _cuda_error(client),
        "config": client.get_model_config("tiny", as_json=True)["config"],
        "statistics": client.get_inference_statistics("tiny-embed", as_json=True),
    }
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    seen["after"] = sorted(client.get_system_shared_memory_status().regions)
    for each in (region, result):
        shared.destroy_shared_memory_region(each)
    return seen


def _cuda_error(client: Any) -> str:
    try:
        client.register_cuda_shared_memory("gpu", b"aGFuZGxl", 0, 64)
    except InferenceServerException as error:
        return str(error.message())
    return "OK"


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
