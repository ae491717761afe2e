"""Keys of a file: scopes, quotas, expiry and reloading, over REST and gRPC; the workers' token."""

import base64
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from pydantic import ValidationError

from service.errors import QuotaExceededError
from service.key_file import create_key, read_keys, revoke_key
from service.keys import WORKER_TOKEN, Keys, worker_token
from service.quotas import Bucket, Quotas
from service.settings import Settings
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from tests.conftest import Running, answers, free_port, process, running, wait_until

TOKEN = "a-token-of-the-workers"
DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def keys(keys_file: Path) -> dict[str, str]:
    """One key for each scope, by its scope."""
    scopes: tuple[Any, ...] = ("infer", "heads", "admin", "metrics")
    return {scope: create_key(keys_file, [scope])[1] for scope in scopes}


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def guarded(
    tiny_catalog: Path,
    keys_file: Path,
    keys: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Running]:
    apart = "apart" in request.param
    collections = str(tmp_path_factory.mktemp("collections"))
    settings = {"keys_file": str(keys_file), "worker_token": TOKEN, "collections": collections}
    with running(tiny_catalog, apart=apart, **settings) as server:
        server.wait_ready()
        yield server


def classify(server: Running, photo: bytes, key: str) -> httpx.Response:
    return server.client.post("/classify", content=photo, headers={"X-API-Key": key})


def test_a_key_permits_its_scope_and_no_other(
    guarded: Running, keys: dict[str, str], jpegs: dict[str, bytes]
) -> None:
    def statuses(key: str) -> dict[str, int]:
        headers = {"Authorization": f"Bearer {key}"}
        client = guarded.client
        return {
            "infer": client.post("/classify", content=jpegs["coffee"], headers=headers).status_code,
            "heads": client.delete("/heads/none", headers=headers).status_code,
            "admin": client.post("/models/none/load", headers=headers).status_code,
            "metrics": client.get("/metrics", headers=headers).status_code,
        }

    permitted = {"infer": 200, "heads": 404, "admin": 404, "metrics": 200}
    for scope in ("infer", "heads", "metrics"):
        expected = dict.fromkeys(permitted, 403) | {scope: permitted[scope]}
        assert statuses(keys[scope]) == expected
    assert statuses(keys["admin"]) == permitted
    assert set(statuses("vitrail-0000-guess").values()) == {403}
    assert guarded.client.get("/metrics").status_code == 401
    for path in ("/healthz", "/infinity/health", "/immich/ping"):
        assert guarded.client.get(path).status_code == 200
    assert guarded.client.get("/infinity/models").status_code == 401
    for path in ("/infinity/embeddings", "/immich/predict"):
        assert guarded.client.post(path).status_code == 401


def test_grpc_checks_the_same_keys(
    guarded: Running, keys: dict[str, str], jpegs: dict[str, bytes]
) -> None:
    ask = pb.TaskRequest(images=[jpegs["coffee"]])
    load = pb.LoadModelRequest(model="tiny")
    with grpc.insecure_channel(guarded.grpc) as channel:
        vision: Any = VisionStub(channel)

        def status(call: Any, request: Any, *metadata: tuple[str, str]) -> Any:
            try:
                call(request, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        infer = ("authorization", f"Bearer {keys['infer']}")
        assert status(vision.Classify, ask) is UNKNOWN
        assert status(vision.Classify, ask, infer) is grpc.StatusCode.OK
        assert status(vision.LoadModel, load, infer) is DENIED
        assert status(vision.LoadModel, load, ("x-api-key", keys["admin"])) is grpc.StatusCode.OK
        assert status(vision.Classify, ask, ("x-api-key", keys["heads"])) is DENIED
        assert status(vision.Classify, ask, (WORKER_TOKEN, "guess")) in (UNKNOWN, DENIED)


def test_the_file_is_read_again_when_it_changes(
    guarded: Running, keys: dict[str, str], keys_file: Path, jpegs: dict[str, bytes]
) -> None:
    record, key = create_key(keys_file, ["infer"], name="visitor")
    assert classify(guarded, jpegs["coffee"], key).status_code == 200
    revoke_key(keys_file, record.id)
    assert classify(guarded, jpegs["coffee"], key).status_code == 403
    whole = keys_file.read_bytes()
    keys_file.write_bytes(whole[:100])
    try:
        assert classify(guarded, jpegs["coffee"], keys["infer"]).status_code == 200
    finally:
        keys_file.write_bytes(whole)


def test_an_expired_key_is_refused(
    guarded: Running, keys_file: Path, jpegs: dict[str, bytes]
) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    _, key = create_key(keys_file, ["infer"], expires=past)
    assert classify(guarded, jpegs["coffee"], key).status_code == 403


def test_quotas_are_counted_per_key(
    guarded: Running, keys: dict[str, str], keys_file: Path, jpegs: dict[str, bytes]
) -> None:
    _, few_requests = create_key(keys_file, ["infer"], requests_per_s=0.001)
    _, few_images = create_key(keys_file, ["infer"], images_per_s=0.001)
    for key in (few_requests, few_images):
        assert classify(guarded, jpegs["coffee"], key).status_code == 200
        refused = classify(guarded, jpegs["coffee"], key)
        assert refused.status_code == 429
        assert refused.json()["type"].endswith("quota-exceeded")
        assert int(refused.headers["Retry-After"]) > 10
        lines = guarded.client.post(
            "/classify",
            content=jpegs["coffee"],
            headers={"X-API-Key": key, "Accept": "application/x-ndjson"},
        )
        assert lines.status_code == 429
    assert classify(guarded, jpegs["coffee"], keys["infer"]).status_code == 200


def test_requests_of_streams_wait_for_their_keys_quotas(
    guarded: Running, keys_file: Path, jpegs: dict[str, bytes]
) -> None:
    _, few_requests = create_key(keys_file, ["infer"], requests_per_s=0.001)
    _, few_images = create_key(keys_file, ["infer"], images_per_s=0.001)

    def codes(key: str, *timeouts_ms: int) -> list[str]:
        requests = [pb.TaskRequest(images=[jpegs["coffee"]], timeout_ms=ms) for ms in timeouts_ms]
        answers = vision.EmbedStream(iter(requests), metadata=(("x-api-key", key),))
        return [answer.results[0].error.code for answer in answers]

    with grpc.insecure_channel(guarded.grpc) as channel:
        vision: Any = VisionStub(channel)
        assert codes(few_images, 0, 100) == ["", "quota-exceeded"]
        assert codes(few_requests, 100) == ["quota-exceeded"]  # the stream itself was one


def test_a_stream_ends_with_its_key(
    guarded: Running, keys_file: Path, jpegs: dict[str, bytes]
) -> None:
    record, key = create_key(keys_file, ["infer"])

    def requests() -> Iterator[pb.TaskRequest]:
        yield pb.TaskRequest(images=[jpegs["coffee"]])
        answered.wait(60)
        revoke_key(keys_file, record.id)
        yield pb.TaskRequest(images=[jpegs["coffee"]])

    answered = threading.Event()
    with grpc.insecure_channel(guarded.grpc) as channel:
        vision: Any = VisionStub(channel)
        answers = vision.EmbedStream(requests(), metadata=(("x-api-key", key),))
        assert next(answers).results[0].error.code == ""
        answered.set()
        assert next(answers).results[0].error.code == "permission-denied"


def test_images_for_a_collection_are_counted_once_and_together(
    guarded: Running, keys_file: Path, jpegs: dict[str, bytes]
) -> None:
    """More of them than a request has elsewhere are embedded in several parts."""
    _, key = create_key(keys_file, ["collections"], images_per_s=0.5)
    _, other = create_key(keys_file, ["collections"])
    path = "/collections/counted"
    put = guarded.client.put(path, json={}, headers={"X-API-Key": other})
    assert put.status_code == 201
    line = json.dumps({"base64": base64.b64encode(jpegs["coffee"]).decode()})
    lines = f"{line}\n" * (Settings().max_images + 1)
    headers = {"X-API-Key": key, "Content-Type": "application/x-ndjson"}

    def add() -> httpx.Response:
        return guarded.client.post(f"{path}/images", content=lines, headers=headers, timeout=60)

    assert add().status_code == 200
    refused = add()
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 2 * Settings().max_images - 60


def test_a_bucket_admits_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.quotas.time.monotonic", lambda: now)
    bucket = Bucket(10)
    assert bucket.take(64) == 0  # larger than a second's tokens
    assert bucket.take(1) == pytest.approx(5.5)
    now = 5.5
    assert bucket.take(1) == 0
    assert bucket.take(1) == pytest.approx(0.1)
    now = 1000.0
    admitted = 0
    while bucket.take(1) == 0:
        admitted += 1
    assert admitted == 10
    quotas = Quotas()
    quotas.take("a", "images", 1, 5)
    with pytest.raises(QuotaExceededError):
        quotas.take("a", "images", 1, 1)
    quotas.take("b", "images", 1, 1)
    quotas.take("a", "images", None, 1)
    for per_s in (2, 1):  # the file has another quota now
        with pytest.raises(QuotaExceededError):
            quotas.take("a", "images", per_s, 1)


def test_changes_and_attempts_are_audited(
    guarded: Running, keys: dict[str, str], keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vitrail.audit"):
        guarded.client.post("/models/tiny/load", headers={"X-API-Key": keys["admin"]})
        guarded.client.post("/models/tiny/load", headers={"X-API-Key": keys["infer"]})
        record, _ = create_key(keys_file, ["infer"])
        guarded.client.get("/models", headers={"X-API-Key": keys["infer"]})
    lines = [r.__dict__ for r in caplog.records if r.name == "vitrail.audit"]
    loads = [line for line in lines if line["message"] == "POST /models/tiny/load"]
    ids = {record.sha256: record.id for record in read_keys(keys_file)}
    assert [line["status"] for line in loads] == [200, 403]
    assert loads[0]["key"] in ids.values()
    assert loads[0]["client"]
    assert any(record.id in line.get("added", ()) for line in lines)
    assert not any(keys["admin"] in str(line) for line in lines)


def test_workers_take_the_token_of_their_gateways(
    tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    """The gateway of `guarded` sends it; here nothing but the token is configured."""
    ask = pb.TaskRequest(images=[jpegs["coffee"]])
    with running(tiny_catalog, apart=True, worker_token=TOKEN) as server:
        server.wait_ready()
        with grpc.insecure_channel(server.grpc) as channel:
            vision: Any = VisionStub(channel)
            with pytest.raises(grpc.RpcError) as error:
                vision.Classify(ask)
            assert error.value.code() is UNKNOWN
            assert vision.Classify(ask, metadata=((WORKER_TOKEN, TOKEN),)).results
        assert server.client.post("/classify", content=jpegs["coffee"]).status_code == 200


def test_only_who_has_the_token_is_a_gateway(tiny_catalog: Path, jpegs: dict[str, bytes]) -> None:
    """A stranger who says so is counted and logged as any other."""
    assert not Keys(Settings()).is_gateway(None)
    assert Keys(Settings(), worker=True).is_gateway(None)
    locked = Keys(Settings(api_keys="user", admin_keys="boss"), worker=True)
    assert not locked.is_gateway(None)
    assert not locked.is_gateway("boss")
    assert locked.is_gateway(worker_token(Settings(admin_keys="boss")))
    with running(tiny_catalog) as server:
        server.wait_ready()
        with grpc.insecure_channel(server.grpc) as channel:
            vision: Any = VisionStub(channel)
            ask = pb.TaskRequest(images=[jpegs["coffee"]])
            vision.Classify(ask, metadata=(("vitrail-gateway", "1"),))
        assert server.metric("vitrail_requests_total", task="classify", outcome="ok") == 1


def test_no_key_is_sent_to_a_worker() -> None:
    sent = worker_token(Settings(admin_keys="boss", api_keys="user"))
    assert sent
    assert "boss" not in sent
    assert sent == worker_token(Settings(admin_keys="boss"))
    # one made from a user's key does not permit what an admin's does
    user = worker_token(Settings(api_keys="user"))
    workers = Keys(Settings(admin_keys="boss", api_keys="user"), worker=True)
    assert workers.authorize("infer", None, None, user)
    with pytest.raises(Exception, match="does not permit"):
        workers.authorize("admin", None, None, user)
    assert workers.authorize("admin", None, None, sent)


def test_admin_and_metrics_can_have_ports_of_their_own(tiny_catalog: Path) -> None:
    port, admin, metrics, rpc = (free_port() for _ in range(4))
    flags = ["--catalog", str(tiny_catalog), "--device", "cpu", "--port", str(port)]
    environment = {
        "VITRAIL_ADMIN_PORT": str(admin),
        "VITRAIL_METRICS_PORT": str(metrics),
        "VITRAIL_ADMIN_KEYS": "boss",
    }
    boss = {"X-API-Key": "boss"}
    with process("serve", *flags, "--grpc-port", str(rpc), **environment) as server:

        def url(port: int, path: str) -> str:
            return f"http://127.0.0.1:{port}{path}"

        wait_until(lambda: answers(url(port, "/readyz")) or server.poll() is not None, 120)
        load = "/models/conv/load"
        statuses = {
            where: (
                httpx.post(url(number, load), headers=boss, timeout=60).status_code,
                httpx.get(url(number, "/metrics")).status_code,
                httpx.get(url(number, "/models")).status_code,
                httpx.get(url(number, "/healthz")).status_code,
                # patterns of routes match before a final newline, too
                httpx.post(url(number, f"{load}%0A"), headers=boss).status_code,
                httpx.get(url(number, "/metrics%0A")).status_code,
            )
            for where, number in (("rest", port), ("admin", admin), ("metrics", metrics))
        }
        assert statuses == {
            "rest": (404, 404, 200, 200, 404, 404),
            "admin": (200, 404, 404, 200, 404, 404),
            "metrics": (404, 200, 404, 200, 404, 404),
        }
        with grpc.insecure_channel(f"127.0.0.1:{rpc}") as channel:
            vision: Any = VisionStub(channel)
            with pytest.raises(grpc.RpcError) as error:
                vision.LoadModel(
                    pb.LoadModelRequest(model="conv"), metadata=(("x-api-key", "boss"),)
                )
            assert error.value.code() is DENIED


def vitrail(*arguments: str, file: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service.cli", "keys", *arguments],
        env={**os.environ, "VITRAIL_KEYS_FILE": str(file)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_a_key_once(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    created = vitrail("create", "--scope", "infer", "--name", "Ann", file=file)
    key = created.stdout.strip()
    [record] = read_keys(file)
    assert record.scopes == ("infer",)
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert Keys(Settings(keys_file=str(file))).authorize("infer", key, None)
    listed = vitrail("list", file=file).stdout
    assert record.id in listed
    assert "Ann" in listed
    assert key not in listed
    assert vitrail("revoke", record.id, file=file).returncode == 0
    assert json.loads(file.read_text()) == {"keys": []}
    assert vitrail("revoke", record.id, file=file).returncode == 2
    assert vitrail("create", "--scope", "root", file=file).returncode == 2
    refused = vitrail("create", "--scope", "infer", "--images-per-s", "-1", file=file)
    assert refused.returncode == 2
    assert "images_per_s" in refused.stderr


def test_a_broken_file_stops_the_start_and_a_missing_one_admits_nobody(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = Keys(Settings(keys_file=str(file)))
    with pytest.raises(Exception, match="does not permit"):
        keys.authorize("infer", "guess", None)
    _, key = create_key(file, ["infer"])
    assert keys.authorize("infer", key, None)
    twice = json.loads(file.read_text())["keys"] * 2
    file.write_text(json.dumps({"keys": [twice[0], twice[1] | {"scopes": ["admin"]}]}))
    with pytest.raises(OSError, match="two keys have the same id"):
        Keys(Settings(keys_file=str(file)))
    file.write_text('{"keys": [{"id": "x"}, {"id": "y"}]}')
    with pytest.raises(OSError, match="not a file of keys") as error:
        Keys(Settings(keys_file=str(file)))
    assert isinstance(error.value.__cause__, ValidationError)
    assert {each["loc"][1] for each in error.value.__cause__.errors()} == {0}  # stops there
