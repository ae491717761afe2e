"""The Vision service through real channels: answers as REST gives them, statuses, streams."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from PIL import Image

from models.inputs.normalize import Normalize
from service.rpc.context import ERROR_KEY
from service.rpc.streams import IN_FLIGHT
from service.stubs import open_inference_pb2 as oip
from service.stubs import vision_pb2 as pb
from service.stubs.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.stubs.vision_pb2_grpc import VisionStub
from service.tensors import from_bytes, pack, to_bytes
from tests.conftest import Running, running, wait_until


@pytest.fixture(scope="module")
def server(tiny_catalog: Path) -> Iterator[Running]:
    with running(tiny_catalog, max_images=8, max_request_bytes=4 * 2**20) as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


@pytest.fixture(scope="module")
def vision(channel: grpc.Channel) -> Any:
    return VisionStub(channel)


def options(**values: Any) -> Struct:
    made = Struct()
    made.update(values)
    return made


def arrays(result: pb.Result | pb.Output) -> dict[str, np.ndarray]:
    return {
        tensor.name: from_bytes(tensor.name, tensor.datatype, tensor.shape, tensor.contents)
        for tensor in result.tensors
    }


def refused(call: Any, request: Any, **how: Any) -> tuple[grpc.StatusCode, pb.Error]:
    """The status of a call that must fail, and the error in its trailing metadata."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request, **how)
    error: Any = caught.value
    assert "Traceback" not in error.details()
    metadata = dict(error.trailing_metadata())
    return error.code(), pb.Error.FromString(metadata[ERROR_KEY])


def test_classify_answers_as_rest_does(
    vision: Any, server: Running, jpegs: dict[str, bytes]
) -> None:
    images = [jpegs["chelsea"], jpegs["rocket"]]
    answer = vision.Classify(pb.TaskRequest(images=images, options=options(top_k=3)))
    files = [("image", image) for image in images]
    rest = server.client.post("/classify?top_k=3", files=files).json()
    assert answer.model.name == rest["model"] == "tiny"
    for result, entry in zip(answer.results, rest["results"], strict=True):
        got = arrays(result)
        predictions = entry["predictions"]
        assert got["label"].tolist() == [item["label"] for item in predictions]
        assert got["index"].tolist() == [item["index"] for item in predictions]
        assert np.allclose(got["score"], [item["score"] for item in predictions], atol=1e-6)
        assert result.timing.compute_ms > 0


def test_predict_asks_several_models(vision: Any, jpegs: dict[str, bytes]) -> None:
    calls = [
        pb.Call(model="tiny", task="classify", options=options(top_k=1)),
        pb.Call(model="tiny-embed"),
        pb.Call(task="embed", options=options(normalize=False)),
    ]
    answer = vision.Predict(pb.PredictRequest(images=[jpegs["coffee"]], calls=calls))
    assert [used.name for used in answer.models] == ["tiny", "tiny-embed", "tiny-embed"]
    best, unit, raw = (arrays(output) for output in answer.results[0].outputs)
    assert best["index"].shape == (1,)
    assert np.linalg.norm(unit["embedding"]) == pytest.approx(1, abs=1e-5)
    scaled = raw["embedding"] / np.linalg.norm(raw["embedding"])
    assert np.allclose(scaled, unit["embedding"], atol=1e-5)


def test_pixels_that_are_preprocessed_give_the_images_answer(
    vision: Any, server: Running, jpegs: dict[str, bytes], photos: dict[str, Image.Image]
) -> None:
    model = server.backend.registry.get("tiny")
    pixels = Normalize(model.trunk.preprocess)(model.trunk.prepare(_jpeg(jpegs["coffee"])))
    tensor = pb.Tensor(datatype="FP32", shape=pixels.shape, contents=to_bytes(pixels.numpy()))
    ours = vision.Embed(pb.TaskRequest(pixel_values=[tensor], model="tiny-embed"))
    theirs = vision.Embed(pb.TaskRequest(images=[jpegs["coffee"]], model="tiny-embed"))
    assert np.allclose(
        arrays(ours.results[0])["embedding"], arrays(theirs.results[0])["embedding"], atol=1e-5
    )


def _jpeg(data: bytes) -> Image.Image:
    from models.inputs.images import decode_image

    return decode_image(data)


def test_images_and_pixels_collate_to_equal_rows(server: Running, jpegs: dict[str, bytes]) -> None:
    """A batch may mix uint8 and float32 rows; both must come out as they do alone."""
    runner = server.backend.trunks.runners["tiny"]
    model = server.backend.registry.get("tiny")
    pixels = model.trunk.prepare(_jpeg(jpegs["coffee"]))
    mixed = runner.trunk.collate([pixels, Normalize(model.trunk.preprocess)(pixels)])
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[0], mixed[1])


def test_a_bad_image_fails_alone_or_the_call_if_it_was_the_only_one(
    vision: Any, jpegs: dict[str, bytes]
) -> None:
    answer = vision.Classify(pb.TaskRequest(images=[jpegs["coffee"], b"no image"]))
    good, bad = answer.results
    assert good.tensors
    assert bad.error.code == "invalid-input"
    status, error = refused(vision.Classify, pb.TaskRequest(images=[b"no image"]))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert error.code == "invalid-input"


NAN = np.full((3, 160, 160), np.nan, np.float32)


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (pb.TaskRequest(), "INVALID_ARGUMENT", "invalid-input"),
        (pb.TaskRequest(images=[b"x"] * 9), "INVALID_ARGUMENT", "payload-too-large"),
        (pb.TaskRequest(images=[b"x"], model="none"), "NOT_FOUND", "not-found"),
        (
            pb.TaskRequest(
                images=[b"x"],
                options=options(**{"\U0001f600" * 900 + str(n): 1 for n in range(99)}),
            ),
            "INVALID_ARGUMENT",
            "invalid-parameters",
        ),
        (
            pb.TaskRequest(images=[b"x"], model="tiny-embed"),
            "INVALID_ARGUMENT",
            "invalid-input",
        ),
        (
            pb.TaskRequest(images=[b"x"], options=options(top_k=0)),
            "INVALID_ARGUMENT",
            "invalid-parameters",
        ),
        (
            pb.TaskRequest(images=[b"x"], options=options(topk=3)),
            "INVALID_ARGUMENT",
            "invalid-parameters",
        ),
        (pb.TaskRequest(images=[b"x"], timeout_ms=-1), "INVALID_ARGUMENT", "invalid-input"),
        (
            pb.TaskRequest(images=[b"x"], pixel_values=[pb.Tensor()]),
            "INVALID_ARGUMENT",
            "invalid-input",
        ),
        (
            pb.TaskRequest(pixel_values=[pb.Tensor(datatype="FP32", shape=[2], contents=b"1")]),
            "INVALID_ARGUMENT",
            "invalid-input",
        ),
        (
            pb.TaskRequest(pixel_values=[pb.Tensor(datatype="FP32", shape=[1], contents=bytes(4))]),
            "INVALID_ARGUMENT",
            "invalid-input",
        ),
        (
            pb.TaskRequest(
                pixel_values=[pb.Tensor(datatype="FP32", shape=NAN.shape, contents=NAN.tobytes())]
            ),
            "INVALID_ARGUMENT",
            "invalid-input",
        ),
    ],
)
def test_wrong_requests_get_their_status(
    vision: Any, request_: pb.TaskRequest, status: str, code: str
) -> None:
    got, error = refused(vision.Classify, request_)
    assert (got.name, error.code) == (status, code)


@pytest.mark.parametrize("letter", ["n", "\U0001f600", "\U000e0001"])
def test_names_of_any_length_get_their_status(channel: grpc.Channel, letter: str) -> None:
    stub: Any = GRPCInferenceServiceStub(channel)
    request = oip.ModelMetadataRequest(name=letter * 10_000)
    status, error = refused(stub.ModelMetadata, request)
    assert (status.name, error.code) == ("NOT_FOUND", "not-found")


def test_tasks_that_no_model_does_are_told(vision: Any, jpegs: dict[str, bytes]) -> None:
    status, _ = refused(vision.Segment, pb.TaskRequest(images=[jpegs["coffee"]]))
    assert status is grpc.StatusCode.NOT_FOUND
    status, error = refused(
        vision.Predict, pb.PredictRequest(images=[b"x"], calls=[pb.Call(options=options(top_k=1))])
    )
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert error.fields[0].field == "task"
    for count in (0, 257):
        calls = [pb.Call(model="tiny")] * count
        request = pb.PredictRequest(images=[jpegs["coffee"]], calls=calls)
        status, error = refused(vision.Predict, request)
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert error.fields[0].field == "calls"


def test_messages_over_the_limit_are_refused_by_grpc(vision: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        vision.Classify(pb.TaskRequest(images=[bytes(6 * 2**20)]))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_stream_answers_in_order_and_survives_bad_requests(
    vision: Any, jpegs: dict[str, bytes]
) -> None:
    photos = list(jpegs.values()) * 20
    requests = [pb.TaskRequest(images=[photo], model="tiny-embed") for photo in photos]
    requests[3] = pb.TaskRequest(images=[b"no image"], model="tiny-embed")
    requests[5] = pb.TaskRequest(images=[photos[5]], model="none")
    answers = list(vision.EmbedStream(iter(requests)))
    assert len(answers) == len(requests)
    assert answers[3].results[0].error.code == "invalid-input"
    assert answers[5].results[0].error.code == "not-found"
    alone = {
        name: arrays(vision.Embed(pb.TaskRequest(images=[jpeg], model="tiny-embed")).results[0])
        for name, jpeg in jpegs.items()
    }
    for position, answer in enumerate(answers):
        if position not in (3, 5):
            name = list(jpegs)[position % len(jpegs)]
            got = arrays(answer.results[0])["embedding"]
            assert np.allclose(got, alone[name]["embedding"], atol=1e-5)


@pytest.mark.parametrize("answering", ["Vision._embed", "OpenInference._answer"])
def test_a_stream_that_is_left_leaves_nothing_behind(
    vision: Any,
    channel: grpc.Channel,
    server: Running,
    jpegs: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    answering: str,
) -> None:
    trunk = server.backend.trunks.runners["tiny"].trunk
    gate, forward = threading.Event(), trunk.forward

    def jam(batch: Any, need: Any) -> Any:
        assert gate.wait(30)
        return forward(batch, need)

    monkeypatch.setattr(trunk, "forward", jam)
    loop = next(iter(server.backend._tasks)).get_loop()

    def of_the_stream() -> int:
        names = [task.get_coro().__qualname__ for task in asyncio.all_tasks(loop)]  # type: ignore[union-attr]
        return sum(name.endswith(("in_order.<locals>.read", answering)) for name in names)

    image = oip.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[1])
    streams: dict[str, tuple[Any, Any]] = {
        "Vision._embed": (vision.EmbedStream, pb.TaskRequest(images=[jpegs["coffee"]])),
        "OpenInference._answer": (
            GRPCInferenceServiceStub(channel).ModelStreamInfer,
            oip.ModelInferRequest(
                model_name="tiny",
                inputs=[image],
                raw_input_contents=[pack([jpegs["coffee"]])],
            ),
        ),
    }
    stream, request = streams[answering]
    call = stream(iter([request] * 100))
    try:
        wait_until(lambda: of_the_stream() > IN_FLIGHT)  # and its reader, which is held up
        time.sleep(0.2)
        assert of_the_stream() <= IN_FLIGHT + 3  # the first one is awaited, the last one waits
        call.cancel()
        wait_until(lambda: of_the_stream() == 0, 20)
    finally:
        gate.set()


def test_a_stream_waits_while_the_queue_is_full(
    tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    with running(tiny_catalog, max_queue_size=2) as small:
        small.wait_ready()
        with grpc.insecure_channel(small.grpc) as opened:
            requests = [pb.TaskRequest(images=[jpegs["coffee"]]) for _ in range(40)]
            answers = list(VisionStub(opened).EmbedStream(iter(requests)))
        refused = small.metric("vitrail_queue_refused_images_total")
        counted = small.metric("vitrail_requests_total", task="embed")
    assert [answer.results[0].error.code for answer in answers] == [""] * 40
    assert (refused > 0, counted) == (True, 40)


def test_models_are_listed_with_the_servers_health(vision: Any, server: Running) -> None:
    listed = vision.ListModels(pb.ListModelsRequest())
    assert listed.live
    assert listed.ready
    assert {model.name: model.ready for model in listed.models} == {
        "tiny": True, "tiny-embed": True, "conv": True,
    }  # fmt: skip


def test_health_is_told_for_the_server_and_every_model(
    channel: grpc.Channel, server: Running
) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    services = ("vitrail.v1.Vision", "inference.GRPCInferenceService")
    for name in ("", "liveness", "tiny", "conv", *services):
        request = health_pb2.HealthCheckRequest(service=name)
        wait_until(lambda request=request: stub.Check(request).status == 1)  # type: ignore[misc]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="none"))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_tells_what_there_is(channel: grpc.Channel) -> None:
    services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert services >= {
        "vitrail.v1.Vision", "inference.GRPCInferenceService", "grpc.health.v1.Health",
    }  # fmt: skip


def test_requests_and_images_are_counted(
    vision: Any, server: Running, jpegs: dict[str, bytes]
) -> None:
    def counts() -> list[float]:
        labels = {"task": "classify", "model": "conv", "outcome": "ok"}
        names = ("vitrail_requests_total", "vitrail_images_total")
        return [server.metric(name, **labels) for name in names]

    before = counts()
    vision.Classify(pb.TaskRequest(images=[jpegs["coffee"], jpegs["rocket"]], model="conv"))
    assert counts() == [before[0] + 1, before[1] + 2]


def test_keys_guard_calls_and_admin_calls(tiny_catalog: Path, jpegs: dict[str, bytes]) -> None:
    with running(tiny_catalog, api_keys="user", admin_keys="boss") as locked:
        wait_until(lambda: locked.client.get("/readyz").status_code == 200)
        with grpc.insecure_channel(locked.grpc) as opened:
            vision: Any = VisionStub(opened)
            ask = pb.TaskRequest(images=[jpegs["coffee"]])
            load = pb.LoadModelRequest(model="conv")
            assert refused(vision.Classify, ask)[0] is grpc.StatusCode.UNAUTHENTICATED
            wrong = (("x-api-key", "guess"),)
            denied = grpc.StatusCode.PERMISSION_DENIED
            assert refused(vision.Classify, ask, metadata=wrong)[0] is denied
            user = (("authorization", "Bearer user"),)
            assert vision.Classify(ask, metadata=user).results
            assert refused(vision.LoadModel, load, metadata=user)[0] is denied
            boss = (("x-api-key", "boss"),)
            unload = pb.UnloadModelRequest(model="conv")
            assert not vision.UnloadModel(unload, metadata=boss).model.ready
            assert vision.LoadModel(load, metadata=boss).model.ready


def test_admin_calls_are_off_without_a_key(vision: Any) -> None:
    status, _ = refused(vision.LoadModel, pb.LoadModelRequest(model="tiny"))
    assert status is grpc.StatusCode.PERMISSION_DENIED


def test_calls_cancelled_at_any_moment_give_their_places_back(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    request = pb.TaskRequest(model="tiny", images=[jpegs["rocket"]] * 8)

    async def call_and_leave(stub: Any, after_ms: float) -> None:
        call = stub.Classify(request)
        await asyncio.sleep(after_ms / 1e3)
        call.cancel()

    async def leave_often() -> None:
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            stub = VisionStub(channel)
            for round_number in range(8):
                moments = [(round_number + 8 * position) / 8 for position in range(8)]
                await asyncio.gather(*(call_and_leave(stub, after) for after in moments))

    asyncio.run(leave_often())
    wait_until(lambda: server.backend.batcher.depth()["tiny"] == 0)
    queue = server.backend.batcher._scheduler.queues["tiny"]
    assert (len(queue), queue.admitted, queue.oldest()) == (0, 0, float("inf"))
