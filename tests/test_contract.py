"""What clients rely on is still there: the interfaces change only by additions."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.gateway.app import create_app
from service.metrics import Metrics
from service.settings import Settings
from tests.contract.compatibility import broken, broken_proto
from tests.test_architecture import ROOT

CONTRACT = Path(__file__).parent / "contract"
PROTOS = {"vision.proto": "proto/vitrail/v1", "open_inference.proto": "proto/inference"}


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((CONTRACT / "openapi.json").read_text())
    return document


def test_the_openapi_document_changed_only_by_additions(stored: dict[str, Any]) -> None:
    backend: Any = None  # the document does not depend on it
    app = create_app(Settings(), backend, Metrics(CollectorRegistry()))
    served = {**app.openapi(), "info": stored["info"]}
    assert list(broken(stored, json.loads(json.dumps(served)))) == []


@pytest.mark.parametrize(("name", "folder"), PROTOS.items())
def test_the_protocol_files_changed_only_by_additions(name: str, folder: str) -> None:
    assert broken_proto((CONTRACT / name).read_text(), (ROOT / folder / name).read_text()) == []


def operation(document: dict[str, Any], path: str) -> Any:
    return document["paths"][path]["post"]


def form(document: dict[str, Any], path: str) -> Any:
    return operation(document, path)["requestBody"]["content"]["multipart/form-data"]["schema"]


def without_path(document: dict[str, Any]) -> None:
    del document["paths"]["/segment"]


def without_parameter(document: dict[str, Any]) -> None:
    parameters = operation(document, "/classify")["parameters"]
    parameters[:] = [item for item in parameters if item["name"] != "top_k"]


def without_media_type(document: dict[str, Any]) -> None:
    del operation(document, "/embed")["requestBody"]["content"]["video/*"]


def other_bound(document: dict[str, Any]) -> None:
    form(document, "/classify")["properties"]["top_k"]["anyOf"][0]["maximum"] = 999


def other_type(document: dict[str, Any]) -> None:
    form(document, "/embed")["properties"]["normalize"]["type"] = "string"


def other_default(document: dict[str, Any]) -> None:
    form(document, "/embed")["properties"]["normalize"]["default"] = False


def without_choice(document: dict[str, Any]) -> None:
    form(document, "/segment")["properties"]["output"]["enum"].remove("rle")


def new_bound(document: dict[str, Any]) -> None:
    form(document, "/zero-shot")["properties"]["labels"]["anyOf"][0]["items"]["maxLength"] = 3


def new_requirement(document: dict[str, Any]) -> None:
    form(document, "/zero-shot")["required"].append("labels")


def other_operation_id(document: dict[str, Any]) -> None:
    operation(document, "/predict")["operationId"] = "predict"


BREAKS = (
    without_path,
    without_parameter,
    without_media_type,
    other_bound,
    other_type,
    other_default,
    without_choice,
    new_bound,
    new_requirement,
    other_operation_id,
)


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
def test_a_document_that_breaks_clients_is_noticed(stored: dict[str, Any], change: Any) -> None:
    changed = copy.deepcopy(stored)
    change(changed)
    assert len(list(broken(stored, changed))) == 1


def test_additions_and_other_prose_are_no_break(stored: dict[str, Any]) -> None:
    changed = copy.deepcopy(stored)
    changed["paths"]["/brightness"] = {"post": {}}
    classify = operation(changed, "/classify")
    classify["description"] = "Another text."
    classify["parameters"].insert(0, {"name": "gamma", "in": "query", "schema": {}})
    classify["responses"]["422"] = {"description": "Invalid"}
    form(changed, "/segment")["properties"]["output"]["enum"].insert(0, "svg")
    assert list(broken(stored, changed)) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("string model = 3;", "string model = 9;"),
        ("string model = 3;", "string name = 3;"),
        ("rpc Embed(TaskRequest)", "rpc EmbedAll(TaskRequest)"),
        ("PRIORITY_BULK = 2;", ""),
    ],
)
def test_a_protocol_file_that_breaks_clients_is_noticed(before: str, after: str) -> None:
    stored = (CONTRACT / "vision.proto").read_text()
    assert before in stored
    assert broken_proto(stored, stored.replace(before, after)) != []
    assert broken_proto(stored, stored.replace("message ", "message New {}\nmessage ")) == []
