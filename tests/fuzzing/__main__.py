"""All hostile inputs: `python -m tests.fuzzing`, or `make fuzz`.

Images and requests go to `vitrail serve` over HTTP; clips, archives, heads, adapters, checkpoints,
catalogs and bodies to their parsers. schemathesis compares answers with the OpenAPI document, and
each parser is fuzzed by coverage. What is done is kept
in `runs/fuzz.json` after each part, so that the next run goes on from there. Prints a row for each
kind: the inputs, the refusals by status, the failures, and the server's memory. Exits with 1 if
there was a failure: a status of 500 or more, an answer that does not come, or an error that is no
refusal.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.servers import Server, free_port
from tests.fuzzing.document import check_document
from tests.fuzzing.live import TOGETHER, Live, ServerFault
from tests.fuzzing.targets import BYTES, PARSERS, be_quiet, try_numbers

PART = 1000
CLIENTS = 4
IMAGES, REQUESTS = "images", "requests"
# The server decodes the same ones.
KINDS = (IMAGES, REQUESTS, *(name for name in PARSERS if name != "images, decoded"))
MAX_FAILURES = 20
# What schemathesis has for each second of a parser's coverage, and its requests of an operation.
SECONDS_OF_DOCUMENT = 10
EXAMPLES_OF_DOCUMENT = 200
MIB = 2**20


@dataclass
class Progress:
    """What has been tried of one kind."""

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    # Resident bytes of the server's processes after the first part, and after the last one.
    memory: tuple[int, int] = (0, 0)


class State:
    """The progress of all kinds, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.kinds = {
            name: Progress(
                entry["tried"], Counter(entry["outcomes"]), entry["failures"],
                tuple(entry["memory"]),
            )
            for name, entry in stored.items()
        }  # fmt: skip

    def of(self, name: str) -> Progress:
        return self.kinds.setdefault(name, Progress())

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({name: vars(each) for name, each in self.kinds.items()}, indent=1)
        temporary = self._path.with_suffix(".new")
        temporary.write_text(content)
        temporary.replace(self._path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="names, separated by commas")
    parser.add_argument("--seconds", type=int, default=60, help="by coverage, for each parser")
    parser.add_argument("--state", type=Path, default=Path("runs/fuzz.json"))
    arguments = parser.parse_args()
    state = State(arguments.state)
    kinds = arguments.kinds.split(",")
    print(_row(("kind", "inputs", "failures", "memory", "outcomes")), flush=True)
    faults = ""
    if live := [name for name in kinds if name in (IMAGES, REQUESTS)]:
        with _server() as server:
            for name in live:
                _try_live(server, name, arguments.inputs, state)
                _report(name, state.of(name))
            if arguments.seconds:
                faults = _check_document(server, arguments.seconds)
    for name in kinds:
        if name in PARSERS:
            _try_parser(name, arguments.inputs, state)
            _report(name, state.of(name))
    failed = [name for name in kinds if state.of(name).failures]
    if faults:
        failed.append("document")
        print(faults, flush=True)
    for name in kinds:
        for failure in state.of(name).failures:
            print(f"{name}: {failure}", flush=True)
    for name in BYTES:
        if arguments.seconds and name in kinds and not _covered(name, arguments):
            failed.append(name)
    tried = sum(state.of(name).tried for name in kinds)
    print(f"{tried} inputs of {len(kinds)} kinds; failures in: {', '.join(failed) or 'none'}")
    sys.exit(1 if failed else 0)


def _parts(progress: Progress, inputs: int) -> Iterator[range]:
    """The numbers that are left, a part at a time."""
    while progress.tried < inputs:
        yield range(progress.tried, min(inputs, progress.tried + PART))


def _add(progress: Progress, part: range, outcomes: Counter[str], failures: Sequence[str]) -> None:
    progress.tried = part.stop
    progress.outcomes += outcomes
    progress.failures += list(failures)[: MAX_FAILURES - len(progress.failures)]


# -- over HTTP -------------------------------------------------------------------------------


@contextmanager
def _server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        port, rpc_port = free_port(), free_port()
        command = [sys.executable, "-m", "service.cli", "serve", "--log-level", "warning"]
        command += ["--port", str(port), "--grpc-port", str(rpc_port)]
        stores = {
            "VITRAIL_HEADS_FOLDER": f"{folder}/heads",
            "VITRAIL_COLLECTIONS": f"{folder}/collections",
        }
        log = Path(folder) / "server.log"
        with Server(command, port, environment=stores, log=log) as server:
            yield server


def _try_live(server: Server, name: str, inputs: int, state: State) -> None:
    progress = state.of(name)
    live = Live(f"http://127.0.0.1:{server.port}")
    work = _images if name == IMAGES else _requests
    with ThreadPoolExecutor(CLIENTS) as pool:
        for part in _parts(progress, inputs):
            groups = [part[start : start + TOGETHER] for start in range(0, len(part), TOGETHER)]
            outcomes: Counter[str] = Counter()
            failures = []
            for tried, failed in pool.map(partial(work, live), groups):
                outcomes += tried
                failures += failed
            _add(progress, part, outcomes, failures)
            now = server.usage().resident_bytes
            progress.memory = (progress.memory[0] or now, now)
            state.save()
    live.close()


def _check_document(server: Server, seconds: int) -> str:
    """The report of schemathesis; empty if it found nothing."""
    url = f"http://127.0.0.1:{server.port}"
    with tempfile.TemporaryDirectory() as folder:
        seconds, examples = SECONDS_OF_DOCUMENT * seconds, EXAMPLES_OF_DOCUMENT
        return check_document(url, Path(folder), seconds=seconds, examples=examples)


def _images(live: Live, numbers: Sequence[int]) -> tuple[Counter[str], list[str]]:
    try:
        return live.try_images(numbers), []
    except Exception as error:
        return Counter(), [f"images from {numbers[0]}: {error!r}"]


def _requests(live: Live, numbers: Sequence[int]) -> tuple[Counter[str], list[str]]:
    outcomes: Counter[str] = Counter()
    failures = []
    for number in numbers:
        try:
            outcomes[live.try_request(number)] += 1
        except ServerFault as error:
            failures.append(str(error))
    return outcomes, failures


# -- parsers ---------------------------------------------------------------------------------


def _try_parser(name: str, inputs: int, state: State) -> None:
    """In a process of its own, since an input may end it."""
    progress = state.of(name)
    for part in _parts(progress, inputs):
        with tempfile.NamedTemporaryFile() as place:
            try:
                with ProcessPoolExecutor(1, get_context("spawn"), be_quiet) as pool:
                    tried = pool.submit(try_numbers, name, part, Path(place.name)).result()
            except BrokenProcessPool:
                number = int(Path(place.name).read_text() or part.start)
                tried = Counter(), [f"{number} ended the process"]
        _add(progress, part, *tried)
        state.save()


def _covered(name: str, arguments: argparse.Namespace) -> bool:
    folder = arguments.state.parent / "fuzz" / name.replace(" ", "-")
    command = [sys.executable, "-m", "tests.fuzzing.coverage", name, str(arguments.seconds)]
    finished = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    stats = dict(
        line.removeprefix("stat::").split(":", 1)
        for line in finished.stderr.splitlines()
        if line.startswith("stat::")
    )
    tried = stats.get("number_of_executed_units", "0").strip()
    print(_row((name, tried, "0" if finished.returncode == 0 else "1", "", "by coverage")))
    if finished.returncode:
        print(finished.stdout[-3000:], finished.stderr[-1000:], sep="\n", flush=True)
    return finished.returncode == 0


def _report(name: str, progress: Progress) -> None:
    before, after = (f"{size / MIB:.0f}" for size in progress.memory)
    memory = f"{before}, {after} MiB" if progress.memory[0] else ""
    outcomes = ", ".join(f"{key} {count}" for key, count in sorted(progress.outcomes.items()))
    columns = (name, str(progress.tried), str(len(progress.failures)), memory, outcomes)
    print(_row(columns), flush=True)


def _row(columns: Sequence[str]) -> str:
    return f"{columns[0]:18}{columns[1]:>10}{columns[2]:>10}{columns[3]:>18}  {columns[4]}"


if __name__ == "__main__":
    main()
