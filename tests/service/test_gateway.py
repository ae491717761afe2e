"""The contract over HTTP: three ways in, per-image results, every row of the error table."""

import base64
import gzip
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.gateway.fetch import is_public
from tests.conftest import Running, encode, running, wait_until


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The body of a problem answer, after checking what all of them share."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body.keys() >= {"type", "title", "status", "detail", "request_id"}
    assert body["status"] == status
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert "Traceback" not in response.text
    return body


def as_json(*images: bytes, **parameters: Any) -> dict[str, Any]:
    entries = [{"base64": base64.b64encode(image).decode()} for image in images]
    return {"images": entries, **parameters}


def as_files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (f"{number}.jpg", image)) for number, image in enumerate(images)]


# -- the three ways ------------------------------------------------------------------------


def test_multipart_raw_and_json_give_one_answer(tiny: Running, jpegs: dict[str, bytes]) -> None:
    photo = jpegs["chelsea"]
    url = "/classify?top_k=3"
    ways = [
        tiny.client.post("/classify", files=as_files(photo), data={"top_k": "3"}),
        tiny.client.post(url, files=as_files(photo)),
        tiny.client.post(url, content=photo, headers={"Content-Type": "image/jpeg"}),
        tiny.client.post(url, content=photo, headers={"Content-Type": "application/octet-stream"}),
        tiny.client.post(url, content=photo),
        tiny.client.post("/classify", json=as_json(photo, top_k=3)),
    ]
    answers = [way.json() for way in ways]
    assert answers[0]["model"] == "tiny"
    assert len(answers[0]["results"][0]["predictions"]) == 3
    assert all(answer == answers[0] for answer in answers)


def test_results_are_in_order_and_a_bad_image_fails_alone(
    tiny: Running, jpegs: dict[str, bytes]
) -> None:
    photos = list(jpegs.values())
    sent = [photos[0], b"", photos[1], b"not an image", photos[2][:500]]
    for response in (
        tiny.client.post("/embed", files=as_files(*sent)),
        tiny.client.post("/embed", json=as_json(*sent)),
    ):
        results = response.json()["results"]
        assert ["error" in entry for entry in results] == [False, True, False, True, True]
        assert [e["error"]["status"] for e in results if "error" in e] == [422, 422, 422]
        alone = tiny.client.post("/embed", content=photos[1]).json()["results"][0]
        assert np.allclose(results[2]["embedding"], alone["embedding"], atol=1e-5)


def test_lists_repeat_in_forms_and_queries_and_are_arrays_in_json(
    tiny: Running, jpegs: dict[str, bytes]
) -> None:
    names = ["tiny", "tiny-embed"]
    photo = jpegs["coffee"]
    for response in (
        tiny.client.post("/predict", files=as_files(photo), data={"models": names}),
        tiny.client.post("/predict", content=photo, params={"models": names}),
        tiny.client.post("/predict", json=as_json(photo, models=names)),
    ):
        answer = response.json()
        assert answer["models"] == names
        outputs = answer["results"][0]["outputs"]
        assert "predictions" in outputs["tiny"]
        assert "embedding" in outputs["tiny-embed"]


def test_embeddings_come_as_floats_base64_or_npy(tiny: Running, jpegs: dict[str, bytes]) -> None:
    photos = as_files(*jpegs.values())
    answer = tiny.client.post("/embed", files=photos).json()
    floats = np.array([entry["embedding"] for entry in answer["results"]], np.float32)
    assert answer["dimensions"] == floats.shape[1]
    assert answer["model_digest"].startswith("sha256:")
    assert answer["preprocess_digest"].startswith("sha256:")
    coded = tiny.client.post("/embed?encoding=base64", files=photos).json()["results"]
    rows = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in coded]
    assert np.array_equal(np.array(rows), floats)
    npy = tiny.client.post("/embed", files=photos, headers={"Accept": "application/x-npy"})
    assert npy.headers["Content-Type"] == "application/x-npy"
    array = np.load(io.BytesIO(npy.content), allow_pickle=False)
    assert array.dtype == np.float32
    assert np.array_equal(array, floats)
    broken = tiny.client.post("/embed", files=[*photos, *as_files(b"x")],
                              headers={"Accept": "application/x-npy"})  # fmt: skip
    problem(broken, 422)


def test_timing_tells_where_the_time_went(tiny: Running, jpegs: dict[str, bytes]) -> None:
    timing = tiny.client.post("/classify?timing=true", content=jpegs["coffee"]).json()["timing"]
    assert timing.keys() == {"decode", "queue", "compute", "total", "batch_size"}
    assert timing["batch_size"] == 1
    assert timing["total"] >= timing["decode"] + timing["compute"] > 0


def test_request_ids_are_the_callers_if_they_are_harmless(tiny: Running) -> None:
    given = tiny.client.get("/healthz", headers={"X-Request-ID": "trace-42"})
    assert given.headers["X-Request-ID"] == "trace-42"
    made = [tiny.client.get("/healthz").headers["X-Request-ID"] for _ in range(2)]
    assert made[0] != made[1]
    long = tiny.client.get("/healthz", headers={"X-Request-ID": "x" * 500})
    assert long.headers["X-Request-ID"] != "x" * 500


# -- models and pages ----------------------------------------------------------------------


def test_models_are_listed_and_described(tiny: Running) -> None:
    listed = {model["name"]: model for model in tiny.client.get("/models").json()["models"]}
    assert listed.keys() == {"tiny", "tiny-embed", "conv"}
    described = tiny.client.get("/models/tiny").json()
    assert described == listed["tiny"]
    assert described.keys() >= {
        "name", "task", "trunk", "state", "source", "format", "dtype", "device",
        "memory_bytes", "preprocess", "labels", "licence", "model_digest",
    }  # fmt: skip
    assert described["state"] == "ready"
    problem(tiny.client.get("/models/nothing"), 404)


def test_openapi_describes_the_three_ways(tiny: Running) -> None:
    schema = tiny.client.get("/openapi.json").json()
    body = schema["paths"]["/classify"]["post"]["requestBody"]["content"]
    assert body.keys() == {"multipart/form-data", "image/*", "video/*", "application/json"}
    assert {"image", "video", "top_k"} <= body["multipart/form-data"]["schema"]["properties"].keys()
    body = schema["paths"]["/segment"]["post"]["requestBody"]["content"]
    assert body.keys() == {"multipart/form-data", "image/*", "application/json"}
    assert "video" not in body["multipart/form-data"]["schema"]["properties"]
    assert tiny.client.get("/docs").status_code == 200


def test_metrics_count_requests_images_and_stages(tiny: Running, jpegs: dict[str, bytes]) -> None:
    before = tiny.metric("vitrail_images_total", model="conv", outcome="ok")
    tiny.client.post("/classify?model=conv", files=as_files(*jpegs.values(), b"bad"))
    assert tiny.metric("vitrail_images_total", model="conv", outcome="ok") == before + 4
    assert tiny.metric("vitrail_images_total", model="conv", outcome="invalid") == 1
    tiny.client.post("/classify?model=made-up", content=jpegs["coffee"])
    assert tiny.metric("vitrail_requests_total", model="unknown", outcome="invalid") == 1
    assert tiny.metric("vitrail_requests_total", model="made-up") == 0
    for stage in ("decode", "queue", "compute", "postprocess"):
        count = tiny.metric("vitrail_stage_duration_seconds_count", stage=stage, trunk="conv")
        assert count >= 4
    assert tiny.metric("vitrail_model_state", model="conv", state="ready") == 1
    assert tiny.metric("vitrail_model_memory_bytes", model="conv") > 0
    assert tiny.metric("vitrail_worker_up") == 1


def test_every_series_exists_before_the_first_request(tiny_catalog: Path) -> None:
    with running(tiny_catalog) as server:
        server.wait_ready()
        text = server.client.get("/metrics").text
        for outcome in ("ok", "invalid", "rejected", "timeout", "cancelled", "error"):
            assert f'vitrail_requests_total{{model="conv",outcome="{outcome}"' in text
        assert 'vitrail_batch_size_count{trunk="tiny"} 0.0' in text


# -- wrong input ---------------------------------------------------------------------------


def test_wrong_parameters_are_named(tiny: Running, jpegs: dict[str, bytes]) -> None:
    photo = jpegs["coffee"]
    for path, field in (
        ("/classify?top_k=0", "top_k"),
        ("/classify?top_k=1001", "top_k"),
        ("/classify?top_k=many", "top_k"),
        ("/classify?topk=3", "topk"),
        ("/embed?pooling=median", "pooling"),
        ("/embed?pooling=ggem", "pooling"),
        ("/embed?model=conv&pooling=cls", "pooling"),
        ("/embed?encoding=hex", "encoding"),
        ("/predict", "models"),
        ("/classify?top_k=3&top_k=4", "top_k"),
        ("/segment?model=tiny", "model"),
    ):
        body = problem(tiny.client.post(path, content=photo), 422)
        assert field in [error["field"] for error in body["errors"]], path
    mistyped = problem(tiny.client.post("/classify?topk=3", content=photo), 422)
    assert mistyped["detail"] == "topk: no such parameter; did you mean top_k?"
    unlabelled = problem(tiny.client.post("/classify", data={'{"top_k": 3}': ""}), 422)
    assert "Content-Type: application/json" in unlabelled["detail"]
    for body in ({"image": "aGVsbG8="}, {}):
        unsent = problem(tiny.client.post("/classify", json=body), 422)
        assert '{"images": [{"base64": "..."}]}' in unsent["detail"]


def test_unknown_models_routes_and_methods(tiny: Running, jpegs: dict[str, bytes]) -> None:
    body = problem(tiny.client.post("/classify?model=nope", content=jpegs["coffee"]), 404)
    assert "nope" in body["detail"]
    problem(tiny.client.post("/predict?models=tiny&models=nope", content=jpegs["coffee"]), 404)
    problem(tiny.client.post("/segment", content=jpegs["coffee"]), 404)
    for path, status in (("/nowhere", 404), ("/classify", 405)):
        body = problem(tiny.client.get(path), status)
        assert body["detail"].startswith(f"GET {path}: ")
        assert "/docs" in body["detail"]
    assert tiny.client.get("/docs").status_code == 200


def bomb() -> bytes:
    """A PNG of a few hundred bytes that promises 30000x30000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_bad_images_get_their_status(tiny: Running, jpegs: dict[str, bytes]) -> None:
    for content, status in (
        (b"", 422),
        (b"hello", 422),
        (jpegs["coffee"][:1000], 422),
        (jpegs["coffee"][:-2000], 422),
        (b"<svg/>", 422),
        (bomb(), 413),
        (bytes(21 * 2**20), 413),
    ):
        response = tiny.client.post("/classify", content=content)
        problem(response, status)
        assert tiny.client.post("/classify", files=as_files(content)).status_code == status


def test_odd_but_good_images_are_answered(tiny: Running, photos: dict[str, Image.Image]) -> None:
    photo = photos["chelsea"]
    sixteen_bit = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) << 8)
    for content in (
        encode(Image.new("RGB", (1, 1)), "PNG"),
        encode(Image.new("RGB", (1, 5000)), "PNG"),
        encode(photo.convert("CMYK"), "JPEG"),
        encode(sixteen_bit, "PNG"),
        encode(photo.convert("RGBA"), "WEBP"),
        encode(photo, "GIF", save_all=True, append_images=[photo.rotate(9)]),
    ):
        assert tiny.client.post("/classify", content=content).status_code == 200


def test_malformed_bodies_are_told_apart(tiny: Running, jpegs: dict[str, bytes]) -> None:
    def send(content: bytes | str, media_type: str) -> httpx.Response:
        return tiny.client.post("/classify", content=content, headers={"Content-Type": media_type})

    problem(send("{not json", "application/json"), 400)
    problem(send("[1, 2]", "application/json"), 400)
    problem(send("[" * 100_000, "application/json"), 400)
    problem(send('{"images": 3}', "application/json"), 422)
    problem(send("{}", "application/json"), 422)
    problem(send('{"images": [{"path": "/etc/passwd"}]}', "application/json"), 422)
    problem(send('{"images": [{"base64": "!!!"}]}', "application/json"), 422)
    problem(send("x", "multipart/form-data"), 400)
    problem(send("garbage", "multipart/form-data; boundary=b"), 400)
    problem(send(jpegs["coffee"], "text/plain"), 415)
    problem(send(jpegs["coffee"], "application/x-www-form-urlencoded"), 415)
    problem(tiny.client.post("/classify", files={"photo": jpegs["coffee"]}), 422)
    problem(tiny.client.post("/classify", data={"image": "text"}, files={"x": b""}), 422)


def test_data_uris_are_taken_as_base64(tiny: Running, jpegs: dict[str, bytes]) -> None:
    uri = "data:image/jpeg;base64," + base64.b64encode(jpegs["coffee"]).decode()
    answer = tiny.client.post("/classify", json={"images": [{"base64": uri}]})
    assert answer.status_code == 200


def test_too_many_images_and_parts_are_413(tiny: Running, jpegs: dict[str, bytes]) -> None:
    pixel = encode(Image.new("RGB", (1, 1)), "PNG")
    problem(tiny.client.post("/classify", files=as_files(*[pixel] * 65)), 413)
    problem(tiny.client.post("/classify", files=as_files(*[pixel] * 10_000)), 413)
    problem(tiny.client.post("/classify", json=as_json(*[pixel] * 65)), 413)
    fields = {f"f{number}": "x" for number in range(10_000)}
    problem(tiny.client.post("/classify", data=fields, files=as_files(pixel)), 413)
    assert tiny.client.post("/classify", files=as_files(*[pixel] * 64)).status_code == 200


def test_bad_deadlines_and_priorities_are_told(tiny: Running, jpegs: dict[str, bytes]) -> None:
    for headers in ({"X-Timeout-Ms": "soon"}, {"X-Timeout-Ms": "-1"}, {"X-Timeout-Ms": "nan"},
                    {"X-Priority": "urgent"}):  # fmt: skip
        problem(tiny.client.post("/classify", content=jpegs["coffee"], headers=headers), 422)
    bulk = tiny.client.post("/classify", content=jpegs["coffee"], headers={"X-Priority": "bulk"})
    assert bulk.status_code == 200
    problem(
        tiny.client.post("/classify", content=jpegs["coffee"], headers={"X-Timeout-Ms": "0.001"}),
        504,
    )


# -- NDJSON --------------------------------------------------------------------------------

NDJSON = {"Accept": "application/x-ndjson"}


def test_every_task_can_answer_in_lines(tiny: Running, jpegs: dict[str, bytes]) -> None:
    photos = as_files(*jpegs.values())
    whole = tiny.client.post("/classify?top_k=2", files=photos).json()["results"]
    answer = tiny.client.post("/classify?top_k=2", files=photos, headers=NDJSON)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    for line, entry in zip(lines, whole, strict=True):
        assert line["model"] == "tiny"
        labels = [item["label"] for item in entry["predictions"]]
        assert [item["label"] for item in line["predictions"]] == labels


def test_an_unreadable_input_has_its_own_line_and_hides_no_wrong_model(
    tiny: Running, jpegs: dict[str, bytes]
) -> None:
    good = {"base64": base64.b64encode(jpegs["coffee"]).decode()}
    body = {"images": [{"base64": "!!!"}, good]}
    answer = tiny.client.post("/classify", json=body, headers=NDJSON)
    bad, fine = [json.loads(line) for line in answer.text.splitlines()]
    assert bad["error"]["status"] == 422
    assert len(fine["predictions"]) == 5
    refused = tiny.client.post("/classify", json={**body, "model": "nope"}, headers=NDJSON)
    problem(refused, 404)


def test_headers_are_checked_before_the_body(tiny: Running) -> None:
    """The body, which is no JSON, would be a 400."""
    headers = {"X-Priority": "urgent", "Content-Type": "application/json"}
    body = problem(tiny.client.post("/classify", content=b"{", headers=headers), 422)
    assert "X-Priority" in body["detail"]


# -- sockets that misbehave ----------------------------------------------------------------


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"


def test_half_sent_bodies_and_garbage_leave_the_server_serving(
    tiny: Running, jpegs: dict[str, bytes]
) -> None:
    for sent in (
        HEAD + b"Content-Length: 5000\r\n\r\nhalf",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"\x16\x03\x01 this is no HTTP\r\n\r\n",
        b"POST /cla",
    ):
        for _ in range(5):
            with connect(tiny) as client:
                client.sendall(sent)
    assert tiny.client.post("/classify", content=jpegs["coffee"]).status_code == 200
    assert tiny.client.get("/readyz").status_code == 200


def test_a_body_declared_too_large_is_refused_before_it_is_sent(tiny: Running) -> None:
    with connect(tiny) as client:
        client.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 413"


def test_slow_senders_are_given_up(tiny_catalog: Path, jpegs: dict[str, bytes]) -> None:
    with running(tiny_catalog, body_timeout_s=0.3) as server:
        server.wait_ready()
        with connect(server) as client:
            client.sendall(HEAD + b"Content-Length: 1000\r\n\r\nx")
            assert client.recv(12) == b"HTTP/1.1 408"
        assert server.client.post("/classify", content=jpegs["coffee"]).status_code == 200


def test_connections_that_never_ask_are_closed(tiny_catalog: Path) -> None:
    with running(tiny_catalog, header_timeout_s=0.3) as server:
        server.wait_ready()
        for sent in (b"", b"POST /classify HTTP/1.1\r\nHost", b"GET /healthz HTTP/1.1\r\n\r\nGET"):
            with connect(server) as client:
                client.sendall(sent)
                while client.recv(4096):
                    pass


def test_headers_that_never_end_are_cut_off(tiny: Running) -> None:
    filler = b"GET /healthz HTTP/1.1\r\n" + b"".join(
        b"X-Filler-%d: %s\r\n" % (number, b"x" * 1000) for number in range(10_000)
    )
    with connect(tiny) as client, pytest.raises(ConnectionError):
        client.sendall(filler)


# -- keys ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def locked(tiny_catalog: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    keys = {"api_keys": "user-1,user-2", "admin_keys": "boss"}
    with running(tiny_catalog, apart="apart" in request.param, **keys) as server:
        server.wait_ready()
        yield server


def test_keys_are_asked_for(locked: Running, jpegs: dict[str, bytes]) -> None:
    def ask(headers: dict[str, str]) -> httpx.Response:
        return locked.client.post("/classify", content=jpegs["coffee"], headers=headers)

    assert "WWW-Authenticate" in ask({}).headers
    problem(ask({}), 401)
    problem(ask({"X-API-Key": "wrong"}), 403)
    problem(ask({"Authorization": "Basic user-1"}), 401)
    umlaut = locked.client.post("/classify", headers=[(b"X-API-Key", "schlüssel".encode())])
    problem(umlaut, 403)
    for headers in (
        {"X-API-Key": "user-1"},
        {"Authorization": "Bearer user-2"},
        {"authorization": "bearer boss"},
    ):
        assert ask(headers).status_code == 200
    problem(locked.client.get("/models"), 401)
    for path in ("/healthz", "/readyz", "/metrics"):
        assert locked.client.get(path).status_code == 200


def test_admin_routes_need_the_admin_key_and_are_off_without_one(
    locked: Running, tiny: Running
) -> None:
    problem(locked.client.post("/models/conv/load"), 401)
    problem(locked.client.post("/models/conv/load", headers={"X-API-Key": "user-1"}), 403)
    boss = {"X-API-Key": "boss"}
    assert locked.client.post("/models/conv/load", headers=boss).json()["state"] == "ready"
    problem(locked.client.post("/models/none/load", headers=boss), 404)
    assert "off" in problem(tiny.client.post("/models/conv/load"), 403)["detail"]


# -- image URLs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_host(jpegs: dict[str, bytes]) -> Iterator[str]:
    """A web server on loopback; its host and port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "http://example.org/photo.jpg")
                self.end_headers()
            elif self.path == "/slow":
                time.sleep(3)
            elif self.path == "/unchanged":
                self.send_response(304)
                self.end_headers()
            elif self.path == "/compressed":
                self.send_response(200)
                self.send_header("Content-Encoding", "gzip, gzip")
                self.end_headers()
                self.wfile.write(gzip.compress(gzip.compress(jpegs["coffee"])))
            elif self.path == "/around":
                self.send_response(302)
                self.send_header("Location", "/photo.jpg")
                self.end_headers()
            else:
                content = bytes(30 * 2**20) if self.path == "/huge" else jpegs["coffee"]
                self.send_response(200 if self.path != "/missing" else 404)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def by_url(server: Running, url: str) -> httpx.Response:
    return server.client.post("/classify", json={"images": [{"url": url}]})


def test_urls_are_off_unless_configured(tiny: Running, image_host: str) -> None:
    assert "off" in problem(by_url(tiny, f"http://{image_host}/photo.jpg"), 422)["detail"]


def test_urls_come_from_allowed_hosts_within_limits(
    tiny_catalog: Path, image_host: str, jpegs: dict[str, bytes]
) -> None:
    allowed: dict[str, Any] = {
        "url_hosts": "127.0.0.1",
        "url_allow_private": True,
        "url_timeout_s": 1,
    }
    with running(tiny_catalog, **allowed) as server:
        server.wait_ready()
        direct = server.client.post("/classify", content=jpegs["coffee"]).json()
        for path in ("photo.jpg", "around"):
            assert by_url(server, f"http://{image_host}/{path}").json() == direct
        for url, status in (
            (f"http://{image_host}/away", 422),
            (f"http://{image_host}/missing", 422),
            (f"http://{image_host}/huge", 413),
            (f"http://{image_host}/slow", 422),
            (f"http://{image_host}/unchanged", 422),
            (f"http://{image_host}/compressed", 422),
            ("http://127.0.0.1:99999/", 422),
            (f"http://user:secret@{image_host}/photo.jpg", 422),
            ("http://example.org/photo.jpg", 422),
            ("file:///etc/passwd", 422),
            ("http://", 422),
            ("http://127.0.0.1:1/", 422),
        ):
            problem(by_url(server, url), status)


def test_fetched_images_count_with_the_body(
    tiny_catalog: Path, image_host: str, jpegs: dict[str, bytes]
) -> None:
    allowed: dict[str, Any] = {"url_hosts": "127.0.0.1", "url_allow_private": True}
    room = int(len(jpegs["coffee"]) * 2.5)
    with running(tiny_catalog, max_request_bytes=room, **allowed) as server:
        server.wait_ready()
        images = [{"url": f"http://{image_host}/photo.jpg"}] * 3
        results = server.client.post("/classify", json={"images": images}).json()["results"]
        errors = [result["error"]["detail"] for result in results if "error" in result]
        assert errors, results
        assert all("bytes, which is the limit" in detail for detail in errors), errors


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::a00:1", False),
        ("::ffff:8.8.8.8", True),
        ("::ffff:10.0.0.1", False),
        ("2002:a00:1::1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
    ],
)
def test_an_address_leads_to_the_public_internet_or_not(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_allowed_hosts_may_not_be_internal(tiny_catalog: Path, image_host: str) -> None:
    port = image_host.partition(":")[2]
    hosts = "127.0.0.1,localhost,[::ffff:127.0.0.1],169.254.169.254"
    with running(tiny_catalog, url_hosts=hosts) as server:
        server.wait_ready()
        for host in ("127.0.0.1", "localhost", "169.254.169.254"):
            detail = problem(by_url(server, f"http://{host}:{port}/photo.jpg"), 422)["detail"]
            assert "not public" in detail


def test_answers_are_strict_json(tiny: Running, jpegs: dict[str, bytes]) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    text = tiny.client.post("/embed?normalize=false", content=jpegs["rocket"]).text
    assert json.loads(text, parse_constant=refuse)


def test_nothing_stays_admitted_after_all_this(tiny: Running) -> None:
    wait_until(lambda: set(tiny.backend.batcher.depth().values()) == {0})


# -- security headers ----------------------------------------------------------------------


def test_every_response_has_security_headers(tiny: Running) -> None:
    for path in ("/", "/docs", "/healthz", "/models", "/none", "/metrics"):
        headers = tiny.client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "script-src 'self'" in tiny.client.get("/").headers["Content-Security-Policy"]
    assert "unsafe-inline'; img" in tiny.client.get("/").headers["Content-Security-Policy"]
    assert "Strict-Transport-Security" not in tiny.client.get("/").headers
