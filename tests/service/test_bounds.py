"""Requests that are small and ask for much: what they hold is counted before it is made."""

import asyncio
import base64
import gc
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from service.errors import InvalidParametersError, PayloadTooLargeError, ServiceError
from service.gateway import dispatch
from service.gateway.collections.parameters import QueryParameters
from service.gateway.disconnect import cancelled_by_disconnect, disconnect
from service.gateway.open_inference.codec import (
    InferenceRequest,
    parse_infer_request,
    write_infer_response,
)
from service.gateway.rest.body import parse_form
from service.gateway.rest.content import share_of
from service.limits import MAX_ANSWER_VALUES, Budget, Share
from service.open_inference.inputs import InputTensor, to_inputs
from service.open_inference.outputs import RequestedOutput
from service.open_inference.shared_memory import SharedMemory
from service.parameters import task_parameters, validate
from service.payloads import (
    BASE64_PIECE,
    MAX_JSON_MARKS,
    PARSER,
    decode_base64,
    parse_json_lines,
    parse_json_object,
)
from service.sampling import INTERVAL_S
from service.settings import Settings
from service.stubs import open_inference_pb2 as oip
from service.stubs import vision_pb2 as pb
from service.stubs.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.stubs.vision_pb2_grpc import VisionStub
from service.tensors import DTYPES, from_bytes, pack, unpack
from service.types import InferResult
from tests.conftest import Running, wait_until

INFER = "/v2/models/tiny/infer"
CLASSIFY = "/vitrail.v1.Vision/Classify"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
MIB = 2**20
AS_JSON = {"Content-Type": "application/json"}


def peak_of(function: Callable[[], Any]) -> int:
    """The most bytes that Python's objects took while the function refused its input."""
    tracemalloc.start()
    try:
        with pytest.raises(ServiceError):
            function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def share() -> Share:
    """What a lone request holds of a budget of its own."""
    return Share(Budget(Settings()), "a client", began=0.0)


def parsed(content: bytes) -> dict[str, Any]:
    return asyncio.run(parse_json_object(content, share()))


def lines_of(content: bytes) -> list[Any]:
    return asyncio.run(parse_json_lines(content, share()))


def refused(answer: httpx.Response, *statuses: int) -> None:
    """The answer is a small problem with one of these statuses."""
    assert answer.status_code in (statuses or (422,)), answer.text[:300]
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert len(answer.content) < 20_000


def tensor(name: str, datatype: str, shape: list[int], **rest: Any) -> dict[str, Any]:
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": [], **rest}]}


# -- tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "status"),
    [
        ("pixel_values", "FP32", [30_000_000, 3, 0, 0], 422),
        ("pixel_values", "FP32", [0, 3, 2**63, 1], 422),
        ("pixel_values", "FP32", [10**400, 3, 1, 1], 422),
        ("pixel_values", "FP32", [65, 3, 1, 1], 413),
        ("latent", "FP32", [30_000_000, 0], 422),
        ("seed", "INT64", [2**62], 422),
        ("image", "BYTES", [4_000_000], 413),
        ("text", "BYTES", [0], 422),
        ("text", "BYTES", [1] * 9, 422),
        ("text", "BYTES", [], 422),
    ],
)
def test_a_tensors_inputs_are_counted_by_its_shape(
    tiny: Running, name: str, datatype: str, shape: list[int], status: int
) -> None:
    refused(tiny.client.post(INFER, json=tensor(name, datatype, shape)), status)
    if max(shape, default=0) < 2**63:
        with grpc.insecure_channel(tiny.grpc) as channel:
            message = oip.ModelInferRequest.InferInputTensor(
                name=name, datatype=datatype, shape=shape
            )
            request = oip.ModelInferRequest(model_name="tiny", inputs=[message])
            with pytest.raises(grpc.RpcError) as caught:
                GRPCInferenceServiceStub(channel).ModelInfer(request)
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_elements_beyond_the_limit_are_never_made() -> None:
    empty = InputTensor(name="image", datatype="BYTES", shape=[10**6], raw=bytes(4 * 10**6))
    nothing = InputTensor(name="pixel_values", datatype="FP32", shape=[10**6, 3, 0, 0], raw=b"")
    for item in (empty, nothing):
        assert peak_of(partial(to_inputs, [item], Settings())) < MIB


def test_numbers_with_a_text_among_them_do_not_become_texts() -> None:
    values = ["A" * 4000, *[0] * (3 * 64 * 64 - 1)]
    sent = InputTensor(name="pixel_values", datatype="FP32", shape=[1, 3, 64, 64], values=values)
    assert peak_of(partial(to_inputs, [sent], Settings())) < MIB


def test_numbers_of_an_answer_in_json_are_counted() -> None:
    request = InferenceRequest("", [], [], {}, None, binary=False, bulk=False)
    arrays = [np.zeros((64, MAX_ANSWER_VALUES // 128 + 1), np.float32)] * 2
    as_json = [RequestedOutput("a"), RequestedOutput("b")]
    with pytest.raises(PayloadTooLargeError, match=r"numbers as JSON.*binary_data"):
        write_infer_response("tiny", request, as_json, arrays, [])
    one_binary = [RequestedOutput("a"), RequestedOutput("b", binary=True)]
    assert len(write_infer_response("tiny", request, one_binary, arrays, []).body) > MIB


def test_a_photos_mask_may_be_json() -> None:
    request = InferenceRequest("7", [], [], {}, None, binary=False, bulk=False)
    mask = np.zeros((1, 1500, 2000), np.uint8)  # more elements than other numbers may be
    mask.ravel()[-1] = 255
    texts = np.array([[b"cat", b"\xff"]], object)
    arrays = [mask, texts, mask[:, :0], mask[:, :2, :2]]
    outputs = [RequestedOutput(name) for name in "abc"] + [RequestedOutput("d", binary=True)]
    body = bytes(write_infer_response("tiny", request, outputs, arrays, []).body)
    assert body[-4:] == bytes(4)
    answer = json.loads(body[:-4])
    assert answer["id"] == "7"
    written = {output["name"]: output for output in answer["outputs"]}
    assert written["a"]["shape"] == [1, 1500, 2000]
    assert np.array_equal(written["a"]["data"], mask.ravel())
    assert written["b"]["data"] == ["Y2F0", "/w=="]
    assert written["c"]["data"] == []
    assert written["d"]["parameters"] == {"binary_data_size": 4}
    with pytest.raises(PayloadTooLargeError):
        write_infer_response("tiny", request, outputs[:1] * 6, [mask] * 6, [])


def test_an_id_that_is_returned_is_short(tiny: Running) -> None:
    body = tensor("image", "BYTES", [1], data=["AA=="]) | {"id": "a" * 5000}
    refused(tiny.client.post(INFER, json=body))


@pytest.mark.parametrize("shape", [[3, 0, 0], [0, 3, 2**62], [1] * 9, [2**62, 2**62]])
def test_tensors_of_vision_have_numbers(tiny: Running, shape: list[int]) -> None:
    with grpc.insecure_channel(tiny.grpc) as channel:
        stub: Any = VisionStub(channel)
        sent = [pb.Tensor(name="pixel_values", datatype="FP32", shape=shape)]
        for request in (
            pb.TaskRequest(model="tiny", pixel_values=sent),
            pb.TaskRequest(model="tiny", latents=sent),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Classify(request)
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", [CLASSIFY, MODEL_INFER])
@pytest.mark.parametrize("content", [b"\x12\x00" * MIB, b"\x0b" + bytes(2 * MIB)])
def test_a_refused_message_is_not_kept(tiny: Running, method: str, content: bytes) -> None:
    """Nor is it until the garbage collector runs: that counts objects, however large they are."""

    def refuse() -> None:
        with grpc.insecure_channel(tiny.grpc) as channel:
            call: Any = channel.unary_unary(method)
            with pytest.raises(grpc.RpcError):
                call(content, timeout=60)

    refuse()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(5):
            refuse()
        assert tracemalloc.get_traced_memory()[0] < 2 * MIB
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_options_over_grpc_are_finite(tiny: Running, jpegs: dict[str, bytes], value: float) -> None:
    request = pb.TaskRequest(model="tiny", images=[jpegs["rocket"]])
    request.options.update({"top_k": value})
    with grpc.insecure_channel(tiny.grpc) as channel:
        stub: Any = VisionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(request, timeout=60)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("value", [1e400, 1e39, "nan", None, True, "1", [1], {}, -(2**70)])
def test_data_that_is_no_finite_number_is_refused(tiny: Running, value: Any) -> None:
    body = tensor("pixel_values", "FP32", [1, 3, 1, 1], data=[0.5, value, 0.5])
    refused(tiny.client.post(INFER, content=json.dumps(body)), 400, 422)


def test_what_json_made_is_not_counted_while_its_inputs_are_in_work(
    tiny: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """33 images of 3 MiB as JSON filled 512 MiB."""
    made: list[int] = []

    async def infer(request: Request, *others: Any) -> InferResult:
        made.append(share_of(request).made_bytes)
        return await sent(request, *others)

    sent = dispatch.infer
    monkeypatch.setattr(dispatch, "infer", infer)
    size = 3 * 32 * 32
    body = tensor("pixel_values", "FP32", [1, 3, 32, 32], data=[0.5] * size)
    tiny.client.post(INFER, json=body)
    assert made == [4 * size]  # as float32; whatever the model makes of them


def test_text_among_lists_is_not_taken_apart(tiny: Running) -> None:
    body = tensor("text", "BYTES", [3], data=[["a"], "bc"])
    refused(tiny.client.post(INFER, json=body))


def test_outputs_are_counted(tiny: Running, jpegs: dict[str, bytes]) -> None:
    data = [base64.b64encode(jpegs["rocket"]).decode()]
    outputs = [{"name": "probabilities"}] * 1000
    body = tensor("image", "BYTES", [1], data=data) | {"outputs": outputs}
    refused(tiny.client.post(INFER, json=body), 413, 422)
    with grpc.insecure_channel(tiny.grpc) as channel:
        message = oip.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[1])
        request = oip.ModelInferRequest(
            model_name="tiny",
            inputs=[message],
            raw_input_contents=[pack([jpegs["rocket"]])],
            outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name="probabilities")] * 1000,
        )
        with pytest.raises(grpc.RpcError) as caught:
            GRPCInferenceServiceStub(channel).ModelInfer(request)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "1000 outputs" in error.details()


# -- bodies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b'{"images": [' + b"[]," * 1_000_000 + b"[]]}",
        b"{" + b",".join(b'"k%d": 1' % n for n in range(200_000)) + b"}",
        b'{"a": [' + b"1," * 1_000_001 + b"1]}",
        b'{"a": "' + b"\\n" * 1_000_001 + b'"}',
    ],
    ids=["lists", "keys", "numbers", "escapes"],
)
def test_json_is_counted_before_it_is_parsed(tiny: Running, content: bytes) -> None:
    for path in ("/classify", "/v1/embeddings", INFER, "/heads"):
        headers = {"Content-Type": "application/json"}
        refused(tiny.client.post(path, content=content, headers=headers), 413)
    assert peak_of(lambda: parsed(content)) < MIB


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/tei/embed", {"inputs": []}),
        ("/tei/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}),
        ("/tei/rerank", {"query": "a", "texts": []}),
        ("/infinity/rerank", {"query": "a", "documents": []}),
        ("/cohere/v2/embed", {"texts": []}),
        ("/cohere/v2/embed", {"images": []}),
        ("/cohere/v2/embed", {"inputs": []}),
        ("/cohere/v2/embed", {"texts": ["a"], "embedding_types": []}),
    ],
)
def test_elements_are_counted_before_each_is_checked(
    tiny: Running, path: str, fields: dict[str, Any]
) -> None:
    """A wrong element has an error of its own: a million of them take seconds."""
    content = json.dumps(fields).replace("[]", "[" + "1," * 100_000 + "1]")
    refused(tiny.client.post(path, content=content), 413)


def test_a_long_unknown_name_is_not_compared_with_those_that_exist() -> None:
    """It took a second for a million characters, in which nothing else ran."""
    fields = {"k" * MIB: 1}
    assert peak_of(lambda: validate(task_parameters("classify"), fields)) < 16 * MIB


def test_a_wrong_vector_has_one_error() -> None:
    with pytest.raises(InvalidParametersError) as caught:
        validate(QueryParameters, {"vector": ["a"] * 1000})
    assert len(caught.value.fields) == 1


@pytest.mark.parametrize("latent", [[None] * 10_000, [[None] * 10_000], [[None] * 5000] * 64])
def test_a_wrong_latent_vector_has_one_error(latent: list[Any]) -> None:
    with pytest.raises(InvalidParametersError) as caught:
        validate(task_parameters("generate"), {"latent": latent})
    cause: Any = caught.value.__cause__
    assert cause.error_count() < 100


def test_a_wrong_image_of_a_search_has_one_error() -> None:
    assert validate(QueryParameters, {"image": {str(n): n for n in range(1000)}}).image is not None


@pytest.mark.parametrize("before", [b"", b"x" * 2**16])
def test_spaces_after_a_boundary_are_bounded(tiny: Running, before: bytes) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    content = part + before + b"\r\n--b" + b" " * 100_000 + b"\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    refused(tiny.client.post("/classify", content=content, headers=headers), 413)


def test_what_looks_like_a_boundary_is_counted(tiny: Running) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    content = part + b"\r\n--bX" * 100_000 + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    refused(tiny.client.post("/classify", content=content, headers=headers), 413)


def test_the_fields_of_a_query_are_counted_before_they_are_taken_apart(tiny: Running) -> None:
    for path in ("/classify", "/models", "/no/such/path", "/healthz", "/v2/health/live"):
        refused(tiny.client.post(path + "?" + "a&" * 2000), 413)


@pytest.mark.parametrize("count", [900, 30_000])
def test_the_answer_to_unknown_keys_is_small(tiny: Running, count: int) -> None:
    keys = {f"unknown{n}" + "x" * 300: 1 for n in range(count // 10)}
    refused(tiny.client.post("/embed", json={"texts": ["a"], **keys}), 422)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/zero-shot", '{"labels": ["\\ud800"], "images": []}'),
        ("/embed", '{"texts": ["\\udfff"]}'),
        ("/embed", '{"\\ud800": 1}'),
        ("/v1/embeddings", '{"input": "\\ud800"}'),
        (INFER, '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], '
                '"data": ["\\ud800"]}]}'),
    ],
)  # fmt: skip
def test_half_a_surrogate_is_the_callers_error(tiny: Running, path: str, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    refused(tiny.client.post(path, content=body.encode(), headers=headers), 422)


def test_a_form_has_one_character_set(tiny: Running) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="texts"\r\n\r\n+2AA-\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b; charset=utf-7"}
    refused(tiny.client.post("/embed", content=body, headers=headers), 415)


def test_a_form_without_files_is_small(tiny: Running) -> None:
    body = b"texts=" + b"%41" * 2_000_000
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    refused(tiny.client.post("/embed", content=body, headers=headers), 413)


@pytest.mark.parametrize("timeout", ["1" + "0" * 400, "-1", "true", '"1"', "0", "null"])
def test_any_timeout_is_a_number_or_refused(
    tiny: Running, jpegs: dict[str, bytes], timeout: str
) -> None:
    image = json.dumps(base64.b64encode(jpegs["rocket"]).decode())
    body = tensor("image", "BYTES", [1], data=["IMAGE"]) | {"parameters": {"timeout": "TIMEOUT"}}
    written = json.dumps(body).replace('"IMAGE"', image).replace('"TIMEOUT"', timeout)
    answer = tiny.client.post(INFER, content=written.encode())
    assert answer.status_code == (200 if timeout == "null" else 422)


@pytest.mark.parametrize("header", ["1e400", "1e300", "nan", "-1", "9" * 400])
def test_any_timeout_header_is_a_number_or_refused(
    tiny: Running, jpegs: dict[str, bytes], header: str
) -> None:
    headers = {"X-Timeout-Ms": header}
    answer = tiny.client.post("/classify", content=jpegs["rocket"], headers=headers)
    assert answer.status_code in (200, 422), answer.text


# -- every parser, with anything -----------------------------------------------------------


def tolerate(function: Callable[[], Any]) -> None:
    """Whatever comes, it is read or refused with an error for the caller."""
    try:
        function()
    except ServiceError as error:
        if error.status >= 500:
            raise


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_json_is_read_or_refused(content: bytes) -> None:
    tolerate(lambda: parsed(content))


@given(
    inputs=st.lists(
        st.fixed_dictionaries(
            {
                "name": st.sampled_from(["image", "pixel_values", "seed", "latent", "text"]),
                "datatype": st.sampled_from([*DTYPES, "BF16", "BYTES", "FP99"]),
                "shape": st.lists(st.integers(-1, 3) | st.integers(), max_size=5),
            },
            optional={
                "data": st.lists(json_values, max_size=5),
                "parameters": st.dictionaries(
                    st.sampled_from(["binary_data_size", "x"]), json_values, max_size=2
                ),
            },
        ),
        max_size=2,
    ),
    parameters=st.dictionaries(st.sampled_from(["timeout", "binary_data_output"]), json_values),
    binary=st.binary(max_size=40),
)
def test_any_inference_request_is_read_or_refused(
    inputs: list[dict[str, Any]], parameters: dict[str, Any], binary: bytes
) -> None:
    head = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    headers = Headers({"inference-header-content-length": str(len(head))})
    shared = SharedMemory("").of(None)

    def read() -> None:
        parsed = asyncio.run(
            parse_infer_request(headers, head + binary, partial(shared.read, limit=100), share())
        )
        to_inputs(parsed.inputs, Settings())

    tolerate(read)


@given(
    st.sampled_from([*DTYPES, "BF16", "BYTES", "FP99"]),
    st.lists(st.integers(-1, 4) | st.integers(), max_size=9),
    st.binary(max_size=64),
)
def test_any_tensor_is_read_or_refused(datatype: str, shape: list[int], contents: bytes) -> None:
    tolerate(lambda: from_bytes("x", datatype, shape, contents))


@given(st.lists(st.binary(max_size=9), max_size=9))
def test_packed_elements_come_back(elements: list[bytes]) -> None:
    assert unpack("x", pack(elements), len(elements)) == elements


@given(st.text(max_size=50) | st.binary(max_size=50).map(lambda b: base64.b64encode(b).decode()))
def test_any_base64_is_read_or_refused(text: str) -> None:
    tolerate(lambda: decode_base64(text, "images"))


@given(st.binary(max_size=200), st.sampled_from(["b", "", "b; charset=utf-16", '"']))
def test_any_form_is_read_or_refused(content: bytes, boundary: str) -> None:
    headers = Headers({"content-type": f"multipart/form-data; boundary={boundary}"})
    body = b'--b\r\nContent-Disposition: form-data; name="a"\r\n' + content + b"--b--"
    tolerate(lambda: asyncio.run(parse_form(headers, body, max_files=2, max_fields=2)))


@pytest.mark.parametrize("size", [0, 1, 2**18, 3 * 2**16, 2**19 + 5])
def test_large_base64_is_decoded_in_pieces(size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    text = base64.b64encode(content[:size]).decode()
    assert decode_base64(text, "images") == content[:size]
    assert decode_base64(f"data:image/png;base64,{text}", "images") == content[:size]


@pytest.mark.parametrize("padding", ["AA==", "AAA="])
def test_padding_before_the_end_of_base64_is_refused(padding: str) -> None:
    with pytest.raises(ServiceError, match="base64 does not decode"):
        decode_base64("A" * (BASE64_PIECE - 4) + padding + "AAAA", "images")


def test_json_at_its_limits_is_read() -> None:
    content = b"{" + b'"a": [' + b"[]," * (MAX_JSON_MARKS - 10) + b"[]]}"
    assert len(parsed(content)["a"]) == MAX_JSON_MARKS - 9
    numbers = json.dumps({"a": np.zeros(10**6).tolist()}).encode()
    assert len(parsed(numbers)["a"]) == 10**6


EMOJI = "\U0001f600"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"a": [[0]] * 60_000}),
        json.dumps({"a": [[[]]] * 60_000}),
        json.dumps({"a": [{"": 1.5}] * 60_000}),
        json.dumps({str(n): {} for n in range(60_000)}),
        json.dumps({"a": [1.5] * 900_000}),
        json.dumps({"a": "x" * 2**22}),
        json.dumps({"a": "x" * 2**22 + EMOJI}),
        json.dumps({"a": "x" * 2**22 + EMOJI}, ensure_ascii=False),
        json.dumps({"a": ["x" * 90 + EMOJI] * 30_000}),
        json.dumps({"a": "x" * 2**19 + EMOJI}),
    ],
)
def test_the_memory_of_json_is_counted_before_it_is_parsed(content: str) -> None:
    encoded = content.encode()
    counted = share()
    tracemalloc.start()
    try:
        fields = asyncio.run(parse_json_object(encoded, counted))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert fields
    assert taken < counted.made_bytes + 100_000 < 8 * taken


def test_large_json_is_parsed_one_at_a_time() -> None:
    """Nothing else runs while it is parsed, so there is a pause between two of them."""
    large = json.dumps({"a": "x" * 2**21}).encode()

    async def case() -> None:
        counted = share()
        async with counted.parsing():
            waiting = asyncio.create_task(parse_json_object(large, counted))
            await parse_json_object(b'{"a": 1}', counted)
            await asyncio.sleep(0.1)
            assert not waiting.done()
        assert len((await waiting)["a"]) == 2**21

    asyncio.run(case())


def test_small_json_that_takes_long_waits_for_its_turn() -> None:
    """Ten bodies of 0.6 MiB, each with 200,000 arrays, held the event loop up for two seconds."""
    small = b'{"a": [' + b"[]," * 100_000 + b"[]]}"

    async def case() -> None:
        counted = share()
        async with counted.parsing():
            waiting = asyncio.create_task(parse_json_object(small, counted))
            await asyncio.sleep(0.1)
            assert not waiting.done()
        assert len((await waiting)["a"]) == 100_001

    asyncio.run(case())


def test_json_waits_for_a_parser_whose_request_was_cancelled() -> None:
    large, began, gate = b'{"a": "' + b"x" * 2**21 + b'"}', threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        gate.wait(20)

    async def parse(counted: Share) -> None:
        async with counted.parsing():
            await counted.in_pool(PARSER, work)

    async def case() -> None:
        counted = share()
        cancelled = asyncio.create_task(parse(counted))
        await asyncio.to_thread(began.wait)
        cancelled.cancel()
        waiting = asyncio.create_task(parse_json_object(large, counted))
        await asyncio.sleep(0.1)
        assert (cancelled.cancelled(), waiting.done()) == (True, False)
        gate.set()
        assert len((await waiting)["a"]) == 2**21

    asyncio.run(case())


@contextmanager
def busy_parser(server: Running) -> Iterator[bytes]:
    """A context in which a request keeps the JSON parser busy; a body that has to wait for it."""
    body, gate = json.dumps({"images": ["x" * 2**21]}).encode(), threading.Event()
    wait_until(lambda: bytes_in_flight(server) == 0)  # of the tests before
    with ThreadPoolExecutor(1) as sender:
        PARSER.submit(gate.wait, 60)
        try:
            first = sender.submit(server.client.post, "/classify", content=body, headers=AS_JSON)
            wait_until(lambda: bytes_in_flight(server) == len(body))  # it has its place
            yield body
        finally:
            gate.set()
        assert first.result().status_code == 422


def bytes_in_flight(server: Running) -> float:
    return server.metric("vitrail_request_bytes_in_flight")


def test_a_body_waits_for_the_parser_until_its_deadline(tiny: Running) -> None:
    with busy_parser(tiny) as body:
        headers = AS_JSON | {"X-Timeout-Ms": "200"}
        refused(tiny.client.post("/classify", content=body, headers=headers, timeout=20), 504)


def test_a_body_whose_client_has_gone_does_not_wait_for_the_parser(tiny: Running) -> None:
    with busy_parser(tiny) as body:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{tiny.url}/classify", content=body, headers=AS_JSON, timeout=0.5)
        time.sleep(2 * INTERVAL_S)  # until the bytes in flight have been counted again
        wait_until(lambda: bytes_in_flight(tiny) == len(body), 10)


def test_nothing_is_begun_for_a_client_that_has_gone() -> None:
    scope: dict[str, Any] = {"state": {}}
    disconnect(scope)
    with pytest.raises(ClientDisconnect), cancelled_by_disconnect(scope):
        pytest.fail("begun")


def test_a_body_whose_json_takes_more_than_may_be_held_is_refused() -> None:
    content = json.dumps({"a": "x" * 2**21}).encode()
    small = Share(Budget(Settings(max_bytes_in_flight=2**22, max_request_bytes=2**22)), "a", 0.0)
    small.add(len(content))
    with pytest.raises(PayloadTooLargeError, match="with the copies"):
        asyncio.run(parse_json_object(content, small))
    assert small.made_bytes == 0


@pytest.mark.parametrize(
    "text",
    [
        EMOJI.encode() + b"x" * 2**24,
        b"\\u2713" + b"x" * 2**24,
        b"x" * (2**18 - 10) + b"\\u2713" + b"x" * 2**24,  # where the text is taken apart
        b'\\"' + b"x" * 2**24 + b'\\"\\u2713\\\\',
    ],
)
def test_wide_strings_are_bounded_before_they_are_parsed(text: bytes) -> None:
    """One character of four bytes makes all others of its string as large."""
    with pytest.raises(PayloadTooLargeError, match="strings that are not ASCII"):
        parsed(b'{"a": "' + text + b'"}')
    with pytest.raises(PayloadTooLargeError, match="strings that are not ASCII"):
        lines_of(b'"\n{"a": "' + text + b'"}')  # the first quote has no other in its line


def test_large_images_beside_texts_are_not_wide() -> None:
    image = (b"QUJD" * 16 + b"\\/\\u002b") * 2**18
    fields = parsed(b'{"b": "\\\\", "a": "' + image + b'", "c": "' + EMOJI.encode() + b'\\""}')
    assert len(fields["a"]) == 66 * 2**18
    assert fields["b"] == "\\"
    assert fields["c"] == f'{EMOJI}"'


def test_large_json_holds_no_endless_numbers() -> None:
    long = b"9" * 4000
    content = b'{"a": [' + b", ".join([long] * 300) + b"]}"
    with pytest.raises(ServiceError, match="a number of over 100 digits"):
        parsed(content)
    text = b'{"a": "' + long * 300 + b'"}'
    assert len(parsed(text)["a"]) == 4000 * 300


def test_lines_with_endless_numbers_fail_alone() -> None:
    long = b'{"id": ' + b"9" * 400 + b"}"
    many = [b'{"id": "%d", "a": "%s"}' % (n, b"x" * 2**16) for n in range(20)]
    values = lines_of(b"\n".join([*many, long, b"{not json", b""]))
    assert [value["id"] for value in values[:20]] == [str(n) for n in range(20)]
    assert "over 100 digits" in str(values[20])
    assert "not valid JSON" in str(values[21])
    assert values[21].__traceback__ is values[21].__cause__ is None  # whose frames hold the body
    [bare] = lines_of(b"9" * 2**21)
    assert "over 100 digits" in str(bare)
