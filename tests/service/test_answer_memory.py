"""Large answers are counted from when they are made until they are sent."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.errors import InternalError, UnavailableError
from service.worker.answer_memory import COUNTED_BYTES, AnswerMemory
from tests.conftest import Running, encode, running, wait_until

MIB = 2**20
MODEL = '[models.looks]\ntrunk = "tiny"\ntask = "segment"\nhead = "attention-mask"\n'
# A mask of an image takes 1.5 MiB, and 4.5 MiB more as JSON.
IMAGE = encode(Image.new("RGB", (1536, 1024)), "JPEG")
CAPACITY = 8 * MIB


def result(size: int) -> dict[str, np.ndarray]:
    return {"mask": np.zeros(size, np.uint8), "index": np.arange(2)}


def test_results_are_counted_until_they_are_gone() -> None:
    memory = AnswerMemory(4 * MIB)
    kept = [result(MIB), result(2 * MIB)]
    memory.hold(kept)
    with pytest.raises(UnavailableError, match="Send fewer images at a time"):
        memory.hold([result(2 * MIB)])
    last: list[Any] = [result(MIB), InternalError("of another model")]
    memory.hold(last)  # the refused is not counted
    del last
    kept.pop()
    memory.hold(more := [result(3 * MIB)])
    with pytest.raises(UnavailableError):
        memory.hold([result(COUNTED_BYTES)])
    assert len(kept + more) == 2


def test_small_arrays_are_not_counted() -> None:
    memory = AnswerMemory(COUNTED_BYTES)
    memory.hold([result(COUNTED_BYTES - 1) for _ in range(10)])


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def server(
    tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("answers") / "catalog.toml"
    text = tiny_catalog.read_text().replace("file:", f"file:{tiny_catalog.parent}/")
    path.write_text(text + MODEL)
    limits = {"max_bytes_in_flight": CAPACITY, "max_request_bytes": MIB}
    with running(path, apart="apart" in request.param, **limits) as started:
        started.wait_ready()
        yield started


def segment(server: Running, count: int, output: str = "mask", **headers: str) -> httpx.Response:
    return server.client.post(
        "/segment",
        files=[("image", IMAGE)] * count,
        data={"model": "looks", "output": output},
        headers=headers,
    )


def errors(answer: httpx.Response) -> list[dict[str, Any]]:
    return [each["error"] for each in answer.json()["results"] if "error" in each]


def test_an_answer_that_does_not_fit_is_refused(server: Running) -> None:
    answer = segment(server, 8, "png")  # a few KiB each
    assert not errors(answer)
    answer = segment(server, 8)  # 12 MiB
    assert answer.status_code == 413
    assert "with the copies that are made" in answer.json()["detail"]
    wait_until(lambda: segment(server, 1).status_code == 200)  # nothing is left


def test_a_result_that_never_fits_is_refused(server: Running) -> None:
    image = encode(Image.new("RGB", (3072, 3072)), "JPEG")  # 9 MiB
    answer = server.client.post(
        "/segment", files={"image": image}, data={"model": "looks", "output": "mask"}
    )
    assert answer.status_code == 503
    assert "answers in flight take" in answer.json()["detail"]
    assert answer.headers["Retry-After"] == "1"


def test_a_stream_gives_back_what_it_has_sent(server: Running) -> None:
    answer = segment(server, 4, accept="application/x-ndjson")  # 6 MiB, as JSON 18
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line.get("error") for line in lines] == [None] * 4
