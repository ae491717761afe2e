"""gRPC messages: received once the key was checked, counted before they are parsed."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from service.client_turns import ClientTurns
from service.clients import client
from service.errors import BadRequestError, PayloadTooLargeError, ServiceError
from service.rpc.context import ERROR_KEY
from service.rpc.counting import MAX_VALUES, check_message
from service.rpc.reading import MessageReader
from service.settings import Settings
from service.stubs import open_inference_pb2 as oip
from service.stubs import vision_pb2 as pb
from service.stubs.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.stubs.vision_pb2_grpc import VisionStub
from tests.conftest import Running, running, wait_until

TASK = pb.TaskRequest.DESCRIPTOR.full_name
INFER = oip.ModelInferRequest.DESCRIPTOR.full_name
# The field `model`.
NOT_UTF8 = bytes([pb.TaskRequest.DESCRIPTOR.fields_by_name["model"].number << 3 | 2, 2, 255, 255])
KEY = (("x-api-key", "key"),)


def seeds(count: int) -> bytes:
    return pb.TaskRequest(seeds=[1] * count).SerializeToString()


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def options(count: int) -> bytes:
    made = Struct()
    made.update({"labels": [""] * count})
    return pb.TaskRequest(options=made).SerializeToString()


def numbers(count: int) -> bytes:
    tensor = oip.ModelInferRequest.InferInputTensor(name="pixel_values")
    tensor.contents.fp32_contents.extend([0.0] * count)
    return oip.ModelInferRequest(inputs=[tensor]).SerializeToString()


@pytest.mark.parametrize(
    ("message_type", "content"),
    [
        (TASK, seeds(MAX_VALUES)),
        (TASK, options(MAX_VALUES // 2)),
        (TASK, pb.TaskRequest(images=[b""] * (MAX_VALUES + 1)).SerializeToString()),
        (INFER, numbers(1_000_001)),
        (
            INFER,
            oip.ModelInferRequest(
                outputs=[oip.ModelInferRequest.InferRequestedOutputTensor()] * (MAX_VALUES + 1)
            ).SerializeToString(),
        ),
    ],
    ids=["seeds", "options", "images", "numbers", "outputs"],
)
def test_too_many_values_are_refused(message_type: str, content: bytes) -> None:
    with pytest.raises(PayloadTooLargeError):
        check_message(message_type, content)


@pytest.mark.parametrize(
    ("message_type", "content"),
    [
        (TASK, seeds(100)),
        (TASK, options(1000)),
        (TASK, pb.TaskRequest(images=[bytes(1000)] * 64).SerializeToString()),
        (INFER, numbers(3 * 224 * 224)),
        (TASK, b""),
    ],
)
def test_usual_messages_pass(message_type: str, content: bytes) -> None:
    check_message(message_type, content)


def test_deep_messages_are_refused() -> None:
    content = b""
    for _ in range(60):  # a list of one list: a value's field 6, a list's field 1
        content = b"\x32" + varint(len(content)) + content
        content = b"\x0a" + varint(len(content)) + content
    content = b"\x32" + varint(len(content)) + content
    entry = b"\x0a\x01a\x12" + varint(len(content)) + content
    struct = b"\x0a" + varint(len(entry)) + entry
    field = pb.TaskRequest.DESCRIPTOR.fields_by_name["options"].number
    message = bytes([field << 3 | 2]) + varint(len(struct)) + struct
    with pytest.raises(BadRequestError, match="deep"):
        check_message(TASK, message)


@given(st.binary(max_size=100))
def test_any_bytes_are_counted_or_refused(content: bytes) -> None:
    try:
        check_message(TASK, content)
    except ServiceError as error:
        if error.status >= 500:
            raise


@given(
    st.builds(
        pb.TaskRequest,
        model=st.text(max_size=5),
        images=st.lists(st.binary(max_size=5), max_size=3),
        seeds=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
        timeout_ms=st.floats(),
        latents=st.lists(
            st.builds(pb.Tensor, shape=st.lists(st.integers(0, 2**62), max_size=3)), max_size=2
        ),
    )
)
def test_every_message_of_ours_is_counted(message: pb.TaskRequest) -> None:
    check_message(TASK, message.SerializeToString())


# -- a server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tiny_catalog: Path) -> Iterator[Running]:
    with running(
        tiny_catalog, api_keys="key", body_timeout_s=3, max_requests_in_flight=8
    ) as started:
        wait_until(lambda: started.client.get("/readyz").status_code == 200)
        yield started


@pytest.fixture(scope="module")
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, pb.Error]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    metadata = dict(error.trailing_metadata())
    return error.code(), pb.Error.FromString(metadata.get(ERROR_KEY, b""))


def raw(channel: grpc.Channel, path: str = "/vitrail.v1.Vision/Classify") -> Any:
    """A method that takes encoded messages as they come."""
    method: Any = channel.stream_unary
    return method(path)


def never() -> Iterator[Any]:
    """A message that does not come."""
    threading.Event().wait(20)
    yield from ()


def test_a_key_is_checked_before_a_message_is_received(channel: grpc.Channel) -> None:
    assert refused(lambda: raw(channel)(never()))[0] is grpc.StatusCode.UNAUTHENTICATED
    wrong = (("x-api-key", "wrong"),)
    call = raw(channel)
    assert refused(lambda: call(never(), metadata=wrong))[0] is grpc.StatusCode.PERMISSION_DENIED


def test_a_message_that_does_not_come_is_given_up(channel: grpc.Channel) -> None:
    status, error = refused(lambda: raw(channel)(never(), metadata=KEY))
    assert status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "did not arrive" in error.detail


def test_a_streams_message_that_does_not_come_is_given_up(channel: grpc.Channel) -> None:
    stub: Any = VisionStub(channel)
    silent = stub.EmbedStream(never(), metadata=KEY)
    answered = stub.EmbedStream(chain([pb.TaskRequest(images=[b"none"])], never()), metadata=KEY)
    assert next(answered).results[0].HasField("error")
    infer: Any = GRPCInferenceServiceStub(channel)
    asked = chain([oip.ModelInferRequest(model_name="none", id="7")], never())
    refused_one = infer.ModelStreamInfer(asked, metadata=KEY)
    refusal = next(refused_one)
    assert "none" in refusal.error_message
    assert refusal.infer_response.id == "7"
    for responses in (silent, answered, refused_one):
        status, error = refused(lambda: next(responses))  # noqa: B023
        assert status is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no message arrived" in error.detail


def test_slow_messages_of_one_client_do_not_keep_others_from_receiving() -> None:
    async def receive(name: str, reader: MessageReader, until: asyncio.Event) -> None:
        client.set(name)
        async with reader.receiving():
            await until.wait()

    async def run() -> None:
        reader, never, at_once = MessageReader(Settings()), asyncio.Event(), asyncio.Event()
        at_once.set()
        slow = [asyncio.create_task(receive("slow", reader, never)) for _ in range(100)]
        await asyncio.sleep(0)
        others = [receive("other", reader, at_once) for _ in range(100)]
        await asyncio.wait_for(asyncio.gather(*others), 20)
        for task in slow:
            task.cancel()

    asyncio.run(run())


def test_clients_who_never_send_leave_a_place_to_receive_for_the_next() -> None:
    async def run() -> None:
        receiving, never, began = ClientTurns(16), asyncio.Event(), Counter[str]()

        async def receive(name: str) -> None:
            async with receiving.place(name):
                began[name] += 1
                await never.wait()

        async def start(name: str, calls: int) -> list[asyncio.Task[None]]:
            tasks = [asyncio.create_task(receive(name)) for _ in range(calls)]
            await asyncio.sleep(0)
            return tasks

        slow = {name: await start(name, 100) for name in ("a", "b", "c", "d")}
        assert began == {"a": 8, "b": 4, "c": 2, "d": 1}
        modest = await start("modest", 2)
        assert began["modest"] == 1
        late = await start("late", 1)
        assert began["late"] == 0
        slow["a"][50].cancel()  # one that waits gives nothing back
        slow["a"][0].cancel()
        await asyncio.gather(slow["a"][0], slow["a"][50], return_exceptions=True)
        await asyncio.sleep(0)
        assert began == {"a": 8, "b": 4, "c": 2, "d": 1, "modest": 1, "late": 1}
        never.set()
        ended = await asyncio.gather(*sum(slow.values(), modest + late), return_exceptions=True)
        assert len([error for error in ended if error is not None]) == 2
        assert began == {"a": 98 + 1, "b": 100, "c": 100, "d": 100, "modest": 2, "late": 1}
        await asyncio.gather(*await start("a", 8))

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(
    "content", [b"\xff", NOT_UTF8, b"\x0b", seeds(1_000_000), options(100_000)]
)
def test_what_is_no_message_or_too_much_is_the_callers_error(
    channel: grpc.Channel, content: bytes
) -> None:
    status, error = refused(lambda: raw(channel)(iter([content]), metadata=KEY))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert error.code in ("bad-request", "payload-too-large")


def test_a_call_without_a_message_is_the_callers_error(channel: grpc.Channel) -> None:
    assert refused(lambda: raw(channel)(iter([]), metadata=KEY))[1].code == "bad-request"


@pytest.mark.parametrize(
    "path", ["/inference.GRPCInferenceService/ServerLive", "/grpc.health.v1.Health/Check"]
)
def test_methods_without_a_key_take_small_messages(channel: grpc.Channel, path: str) -> None:
    assert raw(channel, path)(iter([b""])) is not None
    large = b"\x0a\x80\x80\x08" + bytes(2**17)
    assert refused(lambda: raw(channel, path)(iter([large])))[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_calls_of_methods_without_a_key_are_bounded(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest()
    # it is reported a while after HTTP answers
    wait_until(lambda: stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING)
    watching = [stub.Watch(request) for _ in range(8)]
    for watch in watching:
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(request)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    for watch in watching:
        watch.cancel()

    def is_reported() -> bool:
        try:
            return bool(stub.Check(request).status)
        except grpc.RpcError:
            return False

    wait_until(is_reported)


def test_calls_beyond_the_limit_are_refused_over_both_protocols(
    server: Running, channel: grpc.Channel, jpegs: dict[str, bytes]
) -> None:
    waiting = [raw(channel).future(never(), metadata=KEY) for _ in range(8)]
    stub: Any = VisionStub(channel)
    request = pb.TaskRequest(model="tiny", images=[jpegs["rocket"]])
    wait_until(lambda: server.client.get("/v2").status_code == 503)
    status, error = refused(lambda: stub.Classify(request, metadata=KEY))
    assert status is grpc.StatusCode.UNAVAILABLE
    assert error.retry_after_s == 1
    for call in waiting:
        assert call.exception() is not None
    wait_until(lambda: server.client.get("/v2").status_code == 200)
    assert len(stub.Classify(request, metadata=KEY).results) == 1


def test_a_streams_messages_wait_for_room_that_answers_give_back(
    tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    size = len(jpegs["rocket"]) + 1000
    limits: dict[str, Any] = {"max_request_bytes": size, "max_bytes_in_flight": 2 * size}
    request = pb.TaskRequest(model="tiny-embed", images=[jpegs["rocket"]])
    with running(tiny_catalog, **limits) as server, grpc.insecure_channel(server.grpc) as channel:
        server.wait_ready()
        stub: Any = VisionStub(channel)
        # The client does not wait for answers: the second message comes before the first has one.
        responses = list(stub.EmbedStream(iter([request] * 6)))
    assert len(responses) == 6
    assert not any(response.results[0].HasField("error") for response in responses)


def test_a_broken_message_is_what_protobuf_refuses() -> None:
    with pytest.raises(DecodeError):
        pb.TaskRequest.FromString(NOT_UTF8)


def test_a_caller_that_is_cancelled_as_its_place_becomes_free_holds_nobody_up() -> None:
    async def main() -> None:
        receiving = ClientTurns(1)

        async def receive() -> str:
            async with receiving.place("b"):
                return "received"

        async with receiving.place("a"):
            gone, next_one = asyncio.create_task(receive()), asyncio.create_task(receive())
            await asyncio.sleep(0)  # both wait
            gone.cancel()
        assert await asyncio.wait_for(next_one, 10) == "received"
        assert gone.cancelled()

    asyncio.run(main())
