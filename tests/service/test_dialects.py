"""The dialects over the same core: OpenAI's official client, its image forms, and NDJSON."""

import base64
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import cohere
import httpx
import huggingface_hub
import numpy as np
import openai
import pytest

from tests.conftest import Running, running


@pytest.fixture(scope="module")
def image_host(jpegs: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("images")
    (folder / "coffee.jpg").write_bytes(jpegs["coffee"])
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/coffee.jpg"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def server(clip: tuple[Path, Any], request: pytest.FixtureRequest) -> Iterator[Running]:
    apart = "apart" in request.param
    hosts: dict[str, Any] = {"url_hosts": "127.0.0.1", "url_allow_private": True}
    with running(clip[0], apart=apart, max_queue_size=80, **hosts) as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


def data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def ours(server: Running, **body: Any) -> Any:
    answer = server.client.post("/embed", json=body)
    return [entry["embedding"] for entry in answer.json()["results"]]


def image_entry(jpeg: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(jpeg).decode()}


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_official_client_embeds_texts(
    client: openai.OpenAI, server: Running, encoding: Any
) -> None:
    texts = ["a cat", "a dog"]
    answer = client.embeddings.create(model="clip", input=texts, encoding_format=encoding)
    vectors = [item.embedding for item in answer.data]
    if encoding == "base64":
        vectors = [np.frombuffer(base64.b64decode(str(v)), "<f4").tolist() for v in vectors]
    assert np.allclose(vectors, ours(server, texts=texts), atol=1e-6)
    assert [item.index for item in answer.data] == [0, 1]
    assert answer.model == "clip"


def test_the_official_client_as_it_comes(client: openai.OpenAI, server: Running) -> None:
    cut = {"truncate": True}
    answer = client.embeddings.create(model="clip", input="a cat", dimensions=8, extra_body=cut)
    ours_cut = ours(server, texts=["a cat"], dimensions=8, truncate=True)
    assert np.allclose(answer.data[0].embedding, ours_cut[0], atol=1e-6)
    with pytest.raises(openai.UnprocessableEntityError, match="truncate"):
        client.embeddings.create(model="clip", input="a cat", dimensions=8)


def test_more_texts_than_the_queue_holds_are_taken_in_turns(
    client: openai.OpenAI, server: Running
) -> None:
    texts = [f"photo number {n}" for n in range(200)]
    answer = client.embeddings.create(model="clip", input=texts)
    last = ours(server, texts=texts[-1:])[0]
    assert len(answer.data) == 200
    assert np.allclose(answer.data[-1].embedding, last, atol=1e-5)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {
        "clip", "clip-named", "texts", "images",
    }  # fmt: skip
    assert client.models.retrieve("clip").id == "clip"
    with pytest.raises(openai.NotFoundError, match="no model 'none'"):
        client.models.retrieve("none")


def test_four_image_dialects_and_mixtures(
    server: Running, jpegs: dict[str, bytes], image_host: str
) -> None:
    uri = data_uri(jpegs["coffee"])
    [wanted] = ours(server, model="clip", images=[image_entry(jpegs["coffee"])])
    [text] = ours(server, model="clip", texts=["a cat"])
    encoded = uri.partition(",")[2]
    parts = [{"type": "image_url", "image_url": {"url": uri}}]
    for body, expected in (
        ({"input": [uri], "modality": "image"}, [wanted]),
        ({"input": [image_host], "modality": "image"}, [wanted]),
        ({"input": ["a cat", uri]}, [text, wanted]),
        ({"input": [{"text": "a cat"}, {"image": image_host}, {"image": encoded}]},
         [text, wanted, wanted]),
        ({"messages": [{"role": "user", "content": parts}]}, [wanted]),
        ({"messages": [{"role": "user", "content": "a cat"}]}, [text]),
    ):  # fmt: skip
        for path in ("/v1/embeddings", "/embeddings"):
            answer = server.client.post(path, json={"model": "clip", **body})
            assert answer.status_code == 200, answer.text
            vectors = [item["embedding"] for item in answer.json()["data"]]
            assert np.allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "send input"),
        ({"input": []}, "empty"),
        ({"input": [[1, 2, 3]]}, "token ids"),
        ({"input": [{"video": "x"}]}, "an input is"),
        ({"input": ["ok", "data:image/png;base64,!!!"]}, "input 1"),
        ({"input": ["ok", ""]}, "input 1"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"messages": [{"content": 3}]}, "messages"),
    ],
)
def test_wrong_requests_are_told_in_openais_words(
    server: Running, client: openai.OpenAI, body: dict[str, Any], says: str
) -> None:
    answer = server.client.post("/v1/embeddings", json={"model": "clip", **body})
    assert answer.status_code == 422
    assert says in answer.json()["error"]["message"]


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_ndjson_is_a_line_each_in_order_with_its_own_errors(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    names = list(jpegs) * 6
    files = [("image", jpegs[name]) for name in names]
    files[5] = ("image", b"no image")
    accept = {"Accept": "application/x-ndjson"}
    got = lines(server.client.post("/embed?model=clip", files=files, headers=accept))
    assert [line["index"] for line in got] == list(range(24))
    assert got[5]["error"]["status"] == 422
    alone = {name: ours(server, images=[image_entry(jpegs[name])])[0] for name in jpegs}
    for line, name in zip(got, names, strict=True):
        if line["index"] != 5:
            assert np.allclose(line["embedding"], alone[name], atol=1e-5)
            assert line["model_digest"].startswith("sha256:")


def test_ndjson_comes_before_all_is_done_and_refuses_before_it_begins(
    server: Running, monkeypatch: pytest.MonkeyPatch, jpegs: dict[str, bytes]
) -> None:
    accept = {"Accept": "application/x-ndjson"}
    runner = server.backend.trunks.runners["clip-text"]
    gate, forward = threading.Event(), runner.trunk.forward

    def jam_the_last(batch: Any, need: Any) -> Any:
        # Lanes run batches side by side, so the last text is known by its length in tokens.
        if int((batch != 0).sum(1).max()) > 10:
            assert gate.wait(30)
        return forward(batch, need)

    monkeypatch.setattr(runner.trunk, "forward", jam_the_last)
    body = {"model": "texts", "texts": [f"text {n}" for n in range(69)] + ["long " * 20]}
    with server.client.stream("POST", "/embed", json=body, headers=accept) as answer:
        received = answer.iter_lines()
        first = json.loads(next(received))
        assert first["index"] == 0
        assert "embedding" in first
        gate.set()
        assert all("embedding" in json.loads(line) for line in received)
    refused = server.client.post("/embed?model=none", files=[("image", jpegs["coffee"])],
                                 headers=accept)  # fmt: skip
    assert refused.status_code == 404

    def invalid() -> float:
        return server.metric("vitrail_requests_total", task="embed", outcome="invalid")

    before = invalid()
    wrong = server.client.post("/embed?poling=max", content=jpegs["coffee"], headers=accept)
    assert wrong.status_code == 422
    assert invalid() == before + 1


@pytest.fixture
def cohere_client(server: Running) -> Iterator[cohere.ClientV2]:
    with httpx.Client() as connections:
        url = f"{server.url}/cohere"
        yield cohere.ClientV2(api_key="unused", base_url=url, httpx_client=connections)


def test_coheres_client_embeds_texts_images_and_inputs(
    server: Running, cohere_client: cohere.ClientV2, jpegs: dict[str, bytes]
) -> None:
    client = cohere_client
    uri = data_uri(jpegs["coffee"])
    [image] = ours(server, model="clip", images=[image_entry(jpegs["coffee"])])
    [text] = ours(server, model="clip", texts=["a cat"])
    shared: dict[str, Any] = {"model": "clip", "embedding_types": ["float"]}
    answer = client.embed(**shared, input_type="search_query", texts=["a cat"])
    assert np.allclose(answer.embeddings.float_ or [], [text], atol=1e-5)
    answer = client.embed(**shared, input_type="image", images=[uri])
    assert np.allclose(answer.embeddings.float_ or [], [image], atol=1e-5)
    inputs: Any = [
        {"content": [{"type": "text", "text": "a cat"}]},
        {"content": [{"type": "image_url", "image_url": {"url": uri}}]},
    ]
    types: Any = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    every = client.embed(
        model="clip", input_type="search_document", inputs=inputs, embedding_types=types
    ).embeddings
    assert np.allclose(every.float_ or [], [text, image], atol=1e-5)
    vectors = np.array(every.float_)
    assert np.abs(np.array(every.int8) - vectors * 127).max() <= 0.51
    assert (np.array(every.uint8) == np.array(every.int8) + 128).all()
    bits = np.packbits(vectors > 0, axis=1).astype(int)
    assert (np.array(every.ubinary) == bits).all()
    assert (np.array(every.binary) == bits - 128).all()
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in every.base64 or []]
    assert np.allclose(decoded, vectors, atol=1e-6)
    mixed: Any = [{"content": inputs[0]["content"] + inputs[1]["content"]}]
    with pytest.raises(cohere.UnprocessableEntityError, match="mixtures"):
        client.embed(**shared, input_type="search_document", inputs=mixed)


def test_tei_embeds_and_reranks(server: Running, jpegs: dict[str, bytes]) -> None:
    uri = data_uri(jpegs["coffee"])
    [image] = ours(server, model="clip", images=[image_entry(jpegs["coffee"])])
    query, other = ours(server, model="clip", texts=["a cat", "a dog"])
    answer = server.client.post("/tei/embed", json={"inputs": "a cat", "truncate": True})
    assert np.allclose(answer.json(), [query], atol=1e-5)
    answer = server.client.post("/tei/embed", json={"inputs": ["a cat", uri]})
    assert np.shape(answer.json()) == (2, len(query))
    cut = server.client.post("/tei/embed", json={"inputs": "a cat", "dimensions": 8})
    assert cut.status_code == 422  # the model was not trained for it
    body: dict[str, Any] = {"query": "a cat", "texts": ["a dog", uri, "a cat"], "return_text": True}
    ranked = server.client.post("/tei/rerank", json=body).json()
    scores = {0: np.dot(query, other), 1: np.dot(query, image), 2: 1.0}
    assert {entry["index"]: entry["score"] for entry in ranked} == pytest.approx(scores, abs=1e-4)
    assert ranked[0] == {"index": 2, "score": ranked[0]["score"], "text": "a cat"}
    for body in ({"inputs": []}, {"texts": ["a"]}, {"inputs": ["a", ""]}):
        wrong = server.client.post("/tei/embed", json=body)
        assert wrong.status_code == 422
        assert wrong.json()["error_type"]


def test_hugging_faces_client_embeds_and_compares(
    server: Running, monkeypatch: pytest.MonkeyPatch, jpegs: dict[str, bytes]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it is on loopback
    uri = data_uri(jpegs["coffee"])
    [image] = ours(server, model="clip", images=[image_entry(jpegs["coffee"])])
    cat, dog = ours(server, model="clip", texts=["a cat", "a dog"])
    client = huggingface_hub.InferenceClient(f"{server.url}/tei/embed?model=clip")
    assert np.allclose(client.feature_extraction("a cat"), [cat], atol=1e-5)
    assert np.allclose(client.feature_extraction(uri), [image], atol=1e-5)
    [plain] = client.feature_extraction("a cat", normalize=False, truncate=True)
    assert np.allclose(plain / np.linalg.norm(plain), cat, atol=1e-5)
    assert np.linalg.norm(plain) != pytest.approx(1, abs=1e-3)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="404"):
        huggingface_hub.InferenceClient(f"{server.url}/tei/embed?model=none").feature_extraction(
            "a"
        )
    client = huggingface_hub.InferenceClient(f"{server.url}/tei/similarity?model=clip")
    scores = client.sentence_similarity("a cat", other_sentences=["a dog", uri, "a cat"])
    assert scores == pytest.approx([np.dot(cat, dog), np.dot(cat, image), 1], abs=1e-4)


@pytest.mark.parametrize("prefix", ["", "/immich"])  # Immich drops the path of its URL
def test_immich_searches_by_image_and_text(
    server: Running, jpegs: dict[str, bytes], prefix: str
) -> None:
    assert server.client.get(f"{prefix}/ping").text == "pong"
    [image] = ours(server, model="clip", images=[image_entry(jpegs["coffee"])])
    [text] = ours(server, model="clip", texts=["a cat"])

    def ask(entries: Any, **form: Any) -> httpx.Response:
        files = {name: (None, value) for name, value in {"entries": json.dumps(entries)}.items()}
        return server.client.post(f"{prefix}/predict", files={**files, **form})

    visual = {"clip": {"visual": {"modelName": "clip", "options": {}}}}
    textual = {"clip": {"textual": {"modelName": "clip", "options": {}}}}
    seen = ask(visual, image=("a.jpg", jpegs["coffee"])).json()
    assert np.allclose(json.loads(seen["clip"]), image, atol=1e-5)
    assert (seen["imageWidth"], seen["imageHeight"]) == (600, 400)
    said = ask(textual, text=(None, "a cat")).json()
    assert np.allclose(json.loads(said["clip"]), text, atol=1e-5)
    faces = {"facial-recognition": {"detection": {"modelName": "buffalo_l"}}}
    assert ask(faces, image=("a.jpg", jpegs["coffee"])).status_code == 422
    unknown = {"clip": {"visual": {"modelName": "ViT-B-32__openai"}}}
    assert ask(unknown, image=("a.jpg", jpegs["coffee"])).status_code == 404
    assert ask(visual, image=("a.jpg", b"no image")).status_code == 422


def test_the_official_client_sends_the_forms_of_infinity_and_vllm(
    server: Running, client: openai.OpenAI, jpegs: dict[str, bytes]
) -> None:
    uri = data_uri(jpegs["coffee"])
    [image] = ours(server, model="clip", images=[image_entry(jpegs["coffee"])])
    [text] = ours(server, model="clip", texts=["a cat"])
    with openai.OpenAI(base_url=server.url, api_key="unused", max_retries=0) as infinity:
        answer = infinity.embeddings.create(
            model="clip", input=[uri], extra_body={"modality": "image"}
        )
        assert np.allclose(answer.data[0].embedding, image, atol=1e-5)
        pooled = infinity.post(
            "/pooling", cast_to=object, body={"model": "clip", "input": ["a cat"]}
        )
        assert isinstance(pooled, dict)
        assert np.allclose(pooled["data"][0]["data"], text, atol=1e-5)
    content = [{"type": "image_url", "image_url": {"url": uri}}]
    answer = client.post(
        "/embeddings",
        cast_to=openai.types.CreateEmbeddingResponse,
        body={
            "model": "clip",
            "messages": [{"role": "user", "content": content}],
            "encoding_format": "float",
        },
    )
    assert np.allclose(answer.data[0].embedding, image, atol=1e-5)


def test_vllms_pooling(server: Running, jpegs: dict[str, bytes]) -> None:
    [text] = ours(server, model="clip", texts=["a cat"])
    body = {"model": "clip", "input": ["a cat", data_uri(jpegs["coffee"])]}
    answer = server.client.post("/pooling", json=body).json()
    assert [item["object"] for item in answer["data"]] == ["pooling"] * 2
    assert np.allclose(answer["data"][0]["data"], text, atol=1e-5)


def test_infinitys_clients_embed_rerank_and_list(server: Running, jpegs: dict[str, bytes]) -> None:
    """As infinity_client 0.0.78 sends it, which cannot be installed beside a newer httpx."""
    uri = data_uri(jpegs["coffee"])
    [image] = ours(server, model="clip", images=[image_entry(jpegs["coffee"])])
    cat, dog = ours(server, model="clip", texts=["a cat", "a dog"])

    def post(route: str, **body: Any) -> Any:
        answer = server.client.post(f"/infinity/{route}", json=body)
        assert answer.is_success, answer.text
        return answer.json()

    unspecified = "default/not-specified"
    own = {"model": unspecified, "input": ["a cat"], "dimensions": 0, "modality": "text"}
    answer = post("embeddings", **own)
    assert np.allclose(answer["data"][0]["embedding"], cat, atol=1e-5)
    assert answer.keys() >= {"object", "data", "model", "usage", "id", "created"}
    answer = post("embeddings_image", input=uri, encoding_format="base64")
    decoded = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert np.allclose(decoded, image, atol=1e-5)
    ranking = {"query": "a cat", "documents": ["a dog", uri, "a cat"], "model": unspecified}
    ranked = post("rerank", **ranking, return_documents=True)
    assert ranked["results"][0]["document"] == "a cat"
    scores = {entry["index"]: entry["relevance_score"] for entry in ranked["results"]}
    assert scores == pytest.approx({0: np.dot(cat, dog), 1: np.dot(cat, image), 2: 1.0}, abs=1e-4)
    assert [entry["index"] for entry in post("rerank", **ranking, top_n=1)["results"]] == [2]
    assert server.client.get("/infinity/health").json()["unix"] > 0
    listed = server.client.get("/infinity/models").json()["data"]
    found = {model["id"]: model["capabilities"] for model in listed}
    assert found["clip"] == ["embed", "image_embed", "rerank"]
    assert found["texts"] == ["embed", "rerank"]
    wrong = server.client.post("/infinity/embeddings", json={"input": "a", "modality": "audio"})
    assert wrong.status_code == 422
    assert "modality" in wrong.json()["error"]["message"]
    none = server.client.post("/infinity/classify", json={}).json()["error"]
    assert (none["type"], "classify" in none["message"]) == ("not-found", True)
    other = server.client.get("/infinity/rerank").json()["error"]
    assert other["type"] == "method-not-allowed"
