"""Some of the hostile inputs that `make fuzz` tries: all are answered, or refused."""

import io
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Running, running
from tests.fuzzing.document import check_document
from tests.fuzzing.live import TOGETHER, Live, ServerFault
from tests.fuzzing.targets import OK, PARSERS, outcome_of, try_archive, try_numbers

INPUTS = 100
REQUESTS = 150

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, about images that are damaged


@pytest.mark.parametrize("name", PARSERS)
def test_hostile_inputs_are_parsed_or_refused(name: str) -> None:
    outcomes, failures = try_numbers(name, range(INPUTS))
    assert not failures
    assert 0 < outcomes[OK] < INPUTS


def test_an_archive_with_a_nameless_member_is_refused() -> None:
    """zipfile cuts names at a zero byte; Python 3.11 raises IndexError if nothing is left."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("?", b"")
    nameless = content.getvalue().replace(b"?", b"\0")
    assert outcome_of(lambda: try_archive(nameless)) == "422"


@pytest.fixture(scope="module")
def server(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("fuzzed")
    heads, collections = str(folder / "heads"), str(folder / "collections")
    with running(tiny_catalog, heads_folder=heads, collections=collections) as server:
        server.wait_ready()
        yield server


@pytest.fixture
def live(server: Running) -> Iterator[Live]:
    client = Live(server.url)
    yield client
    client.close()


def test_hostile_images_get_errors_of_their_own(live: Live) -> None:
    outcomes: Counter[str] = Counter()
    for start in range(0, 4 * TOGETHER, TOGETHER):
        outcomes += live.try_images(range(start, start + TOGETHER))
    assert outcomes.total() == 4 * TOGETHER
    assert outcomes[OK]
    assert outcomes["422"]


def test_hostile_requests_get_problems(live: Live) -> None:
    outcomes = Counter(live.try_request(number) for number in range(REQUESTS))
    assert outcomes["422"]
    assert outcomes["200"]


def test_answers_are_as_the_document_says(server: Running, tmp_path: Path) -> None:
    report = check_document(server.url, tmp_path, seconds=12, examples=2)
    assert not report, report[-6000:]


def test_an_answer_that_the_document_does_not_have_is_found(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.errors.InvalidInputError.status", 418)
    report = check_document(server.url, tmp_path, seconds=60, examples=1)
    assert "Undocumented" in report


def test_a_fault_of_the_server_is_found(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """If parsing raised what is no refusal, fuzzing would tell."""
    monkeypatch.setattr("service.gateway.rest.body.parse_json_object", None)
    with pytest.raises(ServerFault, match="500"):
        Counter(live.try_request(number) for number in range(REQUESTS))
