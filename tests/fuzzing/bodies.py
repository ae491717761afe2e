"""Hostile requests: bodies, parameters, names and headers, from the examples of the API's document
and from valid messages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

import numpy as np

from service.stubs import open_inference_pb2 as oip
from service.stubs import vision_pb2 as pb
from service.tensors import pack
from tests.fuzzing.mutations import NUMBERS, TEXTS, VALUES, mutate, mutate_value, to_json

BOUNDARY = "fuzz"
# By header: values of which each is wrong somewhere.
HEADERS: Mapping[str, Sequence[str]] = {
    "X-Timeout-Ms": ("", "0", "-1", "nan", "inf", "1e400", "1_0", "²", "9" * 400, "0x10", "1 "),
    "X-Priority": ("", "bulk", "BULK", "none"),
    "X-Request-ID": ("", "a" * 129, "a b", "é", "{}"),
    "Inference-Header-Content-Length": ("", "-1", "²", "9" * 5000, "0", "1", "1e3", "+1", " 1"),
    "Content-Encoding": ("gzip", "deflate", "br", "gzip, gzip", "identity", ""),
    "Accept-Encoding": ("gzip;q=x", "*", "identity;q=0", ""),
    "Accept": ("application/x-ndjson", "application/x-npy", "image/png", "*/*;q=9", "é"),
    "Range": ("bytes=0-", "bytes=-1", "bytes=9-1", "lines=0-1", "bytes=0-1,1-2" * 50),
    "Authorization": ("Bearer", "Bearer  ", "Basic é", "bearer a b"),
    "X-API-Key": ("", "é", "a" * 3000),
    "traceparent": ("", "00-0-0-0", "é", "a" * 3000),
    "If-None-Match": ("*", '"', "W/"),
    "Content-Type": (
        "", "application/json", "application/json; charset=utf-16", "application/xml", "image/",
        "multipart/form-data", 'multipart/form-data; boundary="', "multipart/form-data; boundary=é",
        f"multipart/form-data; boundary={'b' * 300}", "video/x",
        "application/x-www-form-urlencoded",
        "application/x-ndjson", "application/octet-stream", "application/zip", ";;;", "é",
    ),
}  # fmt: skip
# Their valid requests would start work that lasts, or stop what others need.
LEFT_OUT = ("/heads",)


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request as it is sent."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""


def hostile_request(number: int, document: Mapping[str, Any]) -> HttpRequest:
    """The request of that number.

    Args:
        document: the OpenAPI document.
    """
    random = Random(number)
    path = random.choice([path for path in document["paths"] if path not in LEFT_OUT])
    method = random.choice(list(document["paths"][path]))
    operation = document["paths"][path][method]
    headers = {}
    content = b""
    if bodies := operation.get("requestBody", {}).get("content"):
        media = random.choice(list(bodies))
        headers["Content-Type"] = media.replace("*", random.choice(("jpeg", "png")))
        content = _content(random, media, bodies, document)
        if media == "multipart/form-data":
            headers["Content-Type"] += f"; boundary={BOUNDARY}"
    for name in random.sample(sorted(HEADERS), random.choice((0, 0, 1, 2))):
        headers[name] = random.choice(HEADERS[name])
    return HttpRequest(method.upper(), _path(random, path, operation), headers, content)


def _path(random: Random, path: str, operation: Mapping[str, Any]) -> str:
    query = []
    for parameter in operation.get("parameters", ()):
        value = random.choice([str(each) for each in VALUES if not isinstance(each, list | dict)])
        if parameter["in"] == "path":
            known = ("tiny", "efficientnet-lite0", "photos", "astronaut", "report.json")
            path = path.replace(f"{{{parameter['name']}}}", random.choice((*known, value)) or "-")
        elif parameter["in"] == "query" and random.random() < 0.15:
            query.append(f"{parameter['name']}={_quoted(value)}")
    path = "/".join(map(_quoted, path.split("/")))
    return f"{path}?{'&'.join(query)}" if query else path


def _quoted(text: str) -> str:
    return "".join(
        chr(byte) if (byte < 128 and chr(byte).isalnum()) or byte in b"-_." else f"%{byte:02X}"
        for byte in text.encode("utf-8", "surrogatepass")[:500]
    )


def _content(
    random: Random, media: str, bodies: Mapping[str, Any], document: Mapping[str, Any]
) -> bytes:
    examples = [body["example"] for body in bodies.values() if "example" in body]
    example = examples[0] if examples else {"model": "x", "inputs": [], "images": []}
    match media:
        case "application/json":
            content = to_json(mutate_value(random, example))
            return content if random.random() < 0.8 else mutate(random, content)
        case "application/x-ndjson":
            lines = [to_json(mutate_value(random, example)) for _ in range(random.randrange(4))]
            return b"\n".join(lines)
        case "multipart/form-data":
            schema = bodies[media].get("schema", {})
            if "$ref" in schema:
                schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            return hostile_form(random, list(schema.get("properties", {"image": {}})))
        case "application/x-www-form-urlencoded":
            return mutate(random, b"texts=a&texts=b&normalize=true&output=%ff")
    return random.randbytes(random.choice((0, 1, 50, 3000)))


def hostile_form(random: Random, names: Sequence[str]) -> bytes:
    """A multipart body with parts of these names and others."""
    body = b""
    for _ in range(random.choice((0, 1, 2, 5))):
        name = random.choice((*names, *TEXTS)).encode("utf-8", "replace").replace(b"\r", b"")
        filename = random.choice(
            (b"", b'; filename="a.jpg"', b'; filename=""', b"; filename*=x''%ff")
        )
        value = random.choice((*TEXTS, *map(str, NUMBERS))).encode("utf-8", "surrogatepass")
        body += b"--%s\r\n" % BOUNDARY.encode()
        body += b'Content-Disposition: form-data; name="%s"%s\r\n' % (name[:200], filename)
        body += random.choice((b"", b"Content-Type: image/jpeg\r\n", b"Content-Type: \xff\r\n"))
        body += b"\r\n" + value + b"\r\n"
    body += b"--%s--\r\n" % BOUNDARY.encode()
    return body if random.random() < 0.5 else mutate(random, body)


# -- the Open Inference Protocol -------------------------------------------------------------

TENSOR_NAMES = ("image", "pixel_values", "text", "video", "seed", "latent", "x")
DATATYPES = ("BYTES", "FP32", "FP16", "BF16", "FP64", "UINT8", "INT64", "BOOL", "X")
SHAPES: Sequence[Any] = (
    [1], [2], [1, 1], [1, 3, 2, 2], [0], [], [-1], [2**63], [1] * 9, [2, 0], [10**30, 0], [65],
    [1, 2, 2, 3], [1, 12], None, "1", [None], [1.5],
)  # fmt: skip


def hostile_inference(number: int) -> tuple[dict[str, str], bytes]:
    """The headers and the body of an inference request of that number: JSON, and binary tensors."""
    random = Random(number)
    binary = random.choice((b"", pack([b"ab"]), np.ones(12, np.float32).tobytes(), b"\xff" * 12))
    tensor: dict[str, Any] = {
        "name": random.choice(TENSOR_NAMES),
        "datatype": random.choice(DATATYPES),
        "shape": random.choice(SHAPES),
    }
    match random.randrange(3):
        case 0:
            sizes = (len(binary), len(binary) + 1, -1, True, 2**70, "1")
            tensor["parameters"] = {"binary_data_size": random.choice(sizes)}
        case 1:
            tensor["data"] = random.choice(
                (
                    [1] * 12,
                    ["YQ=="],
                    ["a"],
                    [[1, 2], [3]],
                    [1e400],
                    [10**30],
                    [None],
                    ["\ud800"],
                    {},
                )
            )
    body: Any = {
        "id": random.choice(("", "1")),
        "inputs": [tensor] * random.choice((1, 1, 1, 2, 20)),
        "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
        "parameters": {"timeout": random.choice(VALUES)} if random.random() < 0.3 else {},
    }
    if random.random() < 0.4:
        body = mutate_value(random, body)
    head = to_json(body)
    lengths = (*[str(len(head))] * 12, *HEADERS["Inference-Header-Content-Length"])
    headers = {"inference-header-content-length": random.choice(lengths)}
    return ({} if random.random() < 0.2 else headers), head + binary


@cache
def _messages() -> tuple[tuple[type[Any], bytes], ...]:
    return (
        (
            pb.PredictRequest,
            pb.PredictRequest(
                images=[b"a", b"b"], calls=[pb.Call(model="tiny")], timeout_ms=5
            ).SerializeToString(),
        ),
        (pb.TaskRequest, pb.TaskRequest(images=[b"a"], texts=["a"]).SerializeToString()),
        (
            oip.ModelInferRequest,
            oip.ModelInferRequest(
                model_name="tiny",
                inputs=[
                    oip.ModelInferRequest.InferInputTensor(
                        name="pixel_values", datatype="FP32", shape=[1, 3, 2, 2],
                        contents=oip.InferTensorContents(fp32_contents=[1.0] * 12),
                    )
                ],
                raw_input_contents=[b"abcd"],
            ).SerializeToString(),
        ),
    )  # fmt: skip


def hostile_message(number: int) -> tuple[Any, bytes]:
    """The type of a gRPC message and the encoded message of that number."""
    random = Random(number)
    kind, content = random.choice(_messages())
    return kind, content if random.random() < 0.05 else mutate(random, content)


# -- files of the operator -------------------------------------------------------------------

CATALOG = """
[defaults]
embed = "tiny-embed"

[trunks.tiny]
source = "file:tiny.safetensors"
architecture = "test_vit"
arguments = {num_heads = 2}

[models.tiny]
trunk = "tiny"
task = "classify"
labels = ["a", "b"]

[models.tiny-embed]
trunk = "tiny"
task = "embed"
"""
TOML_VALUES = (
    '""', "0", "-1", "1e400", "nan", "true", "[]", "{}", '["a", 1]', "1979-05-27", '"\\u0000"',
    '"../x"', "9" * 30, '"sha256=0"', "{a = {b = 1}}",
)  # fmt: skip
KEYS = {
    "keys": [
        {
            "id": "ab12", "name": "n", "sha256": "0" * 64, "scopes": ["infer"],
            "requests_per_s": 1.0, "images_per_s": None, "created": "2026-01-01T00:00:00Z",
            "expires": "2027-01-01T00:00:00Z",
        }
    ]
}  # fmt: skip


def hostile_catalog(number: int) -> bytes:
    """The catalog of that number: TOML with a wrong value, or that is none."""
    random = Random(number)
    lines = CATALOG.splitlines()
    for _ in range(random.choice((1, 1, 2))):
        place = random.randrange(len(lines))
        name, equals, _ = lines[place].partition("=")
        match random.randrange(4):
            case 0 if equals:
                lines[place] = f"{name}= {random.choice(TOML_VALUES)}"
            case 1:
                lines.insert(place, random.choice(lines))
            case 2:
                del lines[place]
            case _:
                lines.insert(place, f"{random.choice(('x', 'batch', 'head'))} = {TOML_VALUES[0]}")
    content = "\n".join(lines).encode()
    return content if random.random() < 0.7 else mutate(random, content)


def hostile_keys(number: int) -> bytes:
    """The keys' file of that number."""
    random = Random(number)
    content = to_json(mutate_value(random, json.loads(json.dumps(KEYS))))
    return content if random.random() < 0.7 else mutate(random, content)
