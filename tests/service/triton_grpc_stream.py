"""What `test_triton.py` asks with tritonclient over a gRPC stream; ADDRESS IMAGE.

A process of its own, as `triton_grpc.py` says. Prints what it saw as JSON.
"""

import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc as triton

MANY = 100


class Stream:
    """A stream whose answers are taken from a queue.

    Args:
        may_read: the client reads no further answer until it is set.
    """

    def __init__(self, client: Any, may_read: threading.Event | None = None) -> None:
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._may_read = may_read
        self._client = client
        client.start_stream(self._take)

    def _take(self, result: Any, error: Any) -> None:
        if self._may_read is not None:
            self._may_read.wait(60)
        self.answers.put((result, error))

    def ask(self, model: str, tensor: Any, number: int, **how: Any) -> None:
        self._client.async_stream_infer(model, [tensor], request_id=str(number), **how)

    def next(self) -> tuple[Any, Any]:
        return self.answers.get(timeout=60)


def tensor_of(image: bytes) -> Any:
    encoded = np.frombuffer(image, np.uint8)[None]
    tensor = triton.InferInput("image", encoded.shape, "UINT8")
    tensor.set_data_from_numpy(encoded)
    return tensor


def in_order(client: Any, good: Any) -> list[Any]:
    """The answers to requests of which the second and the third are refused."""
    stream = Stream(client)
    stream.ask("tiny-embed", good, 0)
    stream.ask("tiny-embed", tensor_of(b"no image"), 1)
    stream.ask("none", good, 2)
    stream.ask("tiny-embed", good, 3, enable_empty_final_response=True, timeout=60_000_000)
    stream.ask("tiny", good, 4, outputs=[triton.InferRequestedOutput("label")])
    client.stop_stream()  # waits for all answers
    seen: list[Any] = []
    while not stream.answers.empty():
        result, error = stream.next()
        if error is not None:
            seen.append(str(error.message()))
            continue
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        name = response.outputs[0].name
        values = result.as_numpy(name)[0]
        values = [each.decode() for each in values] if name == "label" else values.tolist()
        seen.append([response.id, final, values])
    return seen


def cancelled(client: Any, good: Any) -> list[str]:
    """How a stream with requests in flight ends when it is cancelled, and what the next answers."""
    stream = Stream(client)
    for number in range(MANY):
        stream.ask("tiny-embed", good, number)
    stream.next()
    client.stop_stream(cancel_requests=True)
    errors = []
    while not stream.answers.empty():
        errors.append(stream.next()[1])
    after = Stream(client)
    after.ask("tiny-embed", good, 7)
    answered = after.next()[0].get_response().id
    client.stop_stream()
    return [str(errors[-1].status()), answered]


def unread(client: Any, other: Any, good: Any) -> dict[str, Any]:
    """What was answered of many requests while their client read nothing, and then in all."""
    outputs = [triton.InferRequestedOutput("tokens")]

    def answered() -> int:
        [entry] = other.get_inference_statistics("tiny-embed", as_json=True)["model_stats"]
        return int(entry["inference_count"])

    before = answered()
    may_read = threading.Event()
    stream = Stream(client, may_read)
    for number in range(MANY):
        stream.ask("tiny-embed", good, number, outputs=outputs)
    count, since = before, time.monotonic()
    while time.monotonic() - since < 1:
        if (now := answered()) != count:
            count, since = now, time.monotonic()
        time.sleep(0.05)
    may_read.set()
    client.stop_stream()
    ids = [stream.next()[0].get_response().id for _ in range(MANY)]
    return {"meanwhile": count - before, "ids": ids}


def main(address: str, path: str) -> dict[str, Any]:
    small_window = [("grpc.http2.bdp_probe", 0)]  # 64 KiB are sent to a client that reads nothing
    client = triton.InferenceServerClient(address, channel_args=small_window)
    other = triton.InferenceServerClient(address)
    good = tensor_of(Path(path).read_bytes())
    return {
        "in_order": in_order(client, good),
        "unread": unread(client, other, good),
        "cancelled": cancelled(client, good),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
