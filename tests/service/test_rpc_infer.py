"""`Infer`, the gRPC method for every task, against the methods that are named after tasks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.struct_pb2 import Struct
from PIL import Image
from prometheus_client import CollectorRegistry

from service.gateway.app import create_app
from service.metrics import Metrics
from service.remote.backend import RemoteBackend
from service.remote.metrics import RemoteMetrics
from service.rpc.context import ERROR_KEY
from service.rpc.server import RpcServer
from service.settings import Settings
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from service.tensors import from_bytes
from tests.conftest import free_port, running, serving, wait_until

LABELS = ["cat", "coffee", "rocket"]


@contextmanager
def stub_of(catalog: Path, *, apart: bool) -> Iterator[Any]:
    """The Vision service of a server, or of a gateway with that server as its worker."""
    with ExitStack() as stack:
        server = stack.enter_context(running(catalog))
        server.wait_ready()
        address = server.grpc
        if apart:
            address = f"127.0.0.1:{free_port()}"
            settings = Settings(workers=(server.grpc,))
            metrics = Metrics(CollectorRegistry())
            backend = RemoteBackend(settings, RemoteMetrics(metrics.registry))
            rpc = RpcServer(backend, settings, metrics).serving(address)
            app = create_app(settings, backend, metrics, rpc)
            _, client = stack.enter_context(serving(app, settings))
            wait_until(lambda: client.get("/readyz").status_code == 200)
        yield VisionStub(stack.enter_context(grpc.insecure_channel(address)))


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def apart(request: pytest.FixtureRequest) -> bool:
    return "apart" in str(request.param)


@pytest.fixture(scope="module")
def tiny(tiny_catalog: Path, apart: bool) -> Iterator[Any]:
    with stub_of(tiny_catalog, apart=apart) as stub:
        yield stub


@pytest.fixture(scope="module")
def towers(clip: tuple[Path, Any], apart: bool) -> Iterator[Any]:
    with stub_of(clip[0], apart=apart) as stub:
        yield stub


def options(**values: Any) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct


def arrays(result: pb.Result) -> dict[str, np.ndarray]:
    assert not result.HasField("error"), result.error
    return {
        tensor.name: from_bytes(tensor.name, tensor.datatype, tensor.shape, tensor.contents)
        for tensor in result.tensors
    }


def grey_levels(png: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png.tobytes())), np.float32)


def assert_equal(ours: pb.TaskResponse, theirs: pb.TaskResponse) -> None:
    """The same model, and the same tensors for every input. Values and grey levels may be rounded
    differently, since a batch's size changes the order of sums.
    """
    assert ours.model == theirs.model
    assert len(ours.results) == len(theirs.results) > 0
    for one, other in zip(ours.results, theirs.results, strict=True):
        left, right = arrays(one), arrays(other)
        assert left.keys() == right.keys()
        for name in left:
            if left[name].dtype.kind == "f":
                np.testing.assert_allclose(left[name], right[name], atol=1e-5)
            elif name == "map":  # a PNG
                one_map, other_map = grey_levels(left[name]), grey_levels(right[name])
                np.testing.assert_allclose(one_map, other_map, atol=1)
            else:
                np.testing.assert_array_equal(left[name], right[name])


def status_of(call: Any, request: Any) -> tuple[grpc.StatusCode, pb.Error]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    error: Any = caught.value
    return error.code(), pb.Error.FromString(dict(error.trailing_metadata())[ERROR_KEY])


@pytest.mark.parametrize(
    ("task", "method", "values"),
    [
        ("classify", "Classify", {"top_k": 3}),
        ("embed", "Embed", {"normalize": False}),
        ("attention", "Attention", {"output": "map"}),
    ],
)
def test_a_task_by_its_name_is_the_method_of_that_name(
    tiny: Any, jpegs: dict[str, bytes], task: str, method: str, values: dict[str, Any]
) -> None:
    images = [jpegs["chelsea"], jpegs["rocket"]]
    request = pb.InferRequest(
        task=task, inputs=pb.Inputs(images=images), options=options(**values), model="tiny"
    )
    named = pb.TaskRequest(images=images, options=options(**values), model="tiny")
    assert_equal(tiny.Infer(request), getattr(tiny, method)(named))


def test_labels_and_texts_are_inferred_by_two_tower_models(
    towers: Any, jpegs: dict[str, bytes]
) -> None:
    images, labels = [jpegs["chelsea"]], options(labels=LABELS)
    request = pb.InferRequest(task="zero-shot", inputs=pb.Inputs(images=images), options=labels)
    assert_equal(
        towers.Infer(request), towers.ZeroShot(pb.TaskRequest(images=images, options=labels))
    )
    request = pb.InferRequest(task="embed", inputs=pb.Inputs(texts=LABELS))
    assert_equal(towers.Infer(request), towers.Embed(pb.TaskRequest(texts=LABELS)))


def test_no_task_is_the_models_own_and_no_model_the_tasks_default(
    tiny: Any, jpegs: dict[str, bytes]
) -> None:
    inputs = pb.Inputs(images=[jpegs["coffee"]])
    own = tiny.Infer(pb.InferRequest(inputs=inputs, model="tiny-embed"))
    default = tiny.Infer(pb.InferRequest(inputs=inputs, task="embed"))
    assert own.model.task == "embed"
    assert default.model.name == "tiny-embed"
    assert_equal(own, default)


def test_an_unknown_task_fails_as_in_a_call_of_predict(tiny: Any, jpegs: dict[str, bytes]) -> None:
    images = [jpegs["coffee"]]
    for model in ("tiny", ""):
        request = pb.InferRequest(task="guess", inputs=pb.Inputs(images=images), model=model)
        call = pb.Call(task="guess", model=model)
        status, error = status_of(tiny.Infer, request)
        expected = status_of(tiny.Predict, pb.PredictRequest(images=images, calls=[call]))
        assert (status, error) == expected
        assert "guess" in error.detail


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (pb.InferRequest(task="classify"), "invalid-input", "images"),
        (pb.InferRequest(inputs=pb.Inputs(images=[b"x"])), "invalid-input", "task"),
        (
            pb.InferRequest(task="classify", inputs=pb.Inputs(images=[b"x"], texts=["x"])),
            "invalid-input",
            "images",
        ),
        (
            pb.InferRequest(
                task="classify", inputs=pb.Inputs(images=[b"x"]), options=options(topk=3)
            ),
            "invalid-parameters",
            "topk",
        ),
        (
            pb.InferRequest(inputs=pb.Inputs(images=[b"x"]), options=options(top_k=3)),
            "invalid-input",
            "task",
        ),
        (
            pb.InferRequest(
                task="classify", inputs=pb.Inputs(images=[b"x"]), timeout_ms=float("nan")
            ),
            "invalid-input",
            "timeout_ms",
        ),
        (
            pb.InferRequest(task="embed", options=options(texts=["x"])),
            "invalid-input",
            "options",
        ),
        (
            pb.InferRequest(task="generate", inputs=pb.Inputs(seeds=[1]), options=options(seed=1)),
            "invalid-input",
            "options",
        ),
    ],
)
def test_wrong_requests_name_the_field(
    tiny: Any, request_: pb.InferRequest, code: str, field: str
) -> None:
    status, error = status_of(tiny.Infer, request_)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.code, error.fields[0].field) == (code, field)


def test_seeds_are_inputs_and_not_options_of_generate(tiny: Any) -> None:
    request = pb.TaskRequest(seeds=[1], options=options(seed=1, n=2))
    status, error = status_of(tiny.Generate, request)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert error.fields[0].field == "options"
    assert "n, seed" in error.detail


def test_requests_of_clients_unknown_tasks_share_one_label(
    tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    with running(tiny_catalog) as server:
        server.wait_ready()
        with grpc.insecure_channel(server.grpc) as channel:
            stub: Any = VisionStub(channel)
            for task in ("guess", "try", "classify"):
                inputs = pb.Inputs(images=[jpegs["coffee"]])
                request = pb.InferRequest(task=task, inputs=inputs, model="tiny")
                if task == "classify":
                    stub.Infer(request)
                else:
                    status_of(stub.Infer, request)
        labels = {"model": "tiny", "outcome": "invalid"}
        assert server.metric("vitrail_requests_total", task="infer", **labels) == 2
        labels["outcome"] = "ok"
        assert server.metric("vitrail_requests_total", task="classify", **labels) == 1
        assert 'task="guess"' not in server.metrics()
