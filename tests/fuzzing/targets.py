"""What is tried for each kind of hostile input, and the refusals that are right."""

import asyncio
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from starlette.datastructures import Headers

from models.catalog import load_catalog
from models.checkpoints.containers import open_container
from models.checkpoints.peft import read_archive as read_adapter
from models.errors import ModelsError
from models.fitting.examples import read_archive
from models.heads.files import decode_head
from models.inputs.canvas import canvas_size
from models.inputs.images import ImageLimits, decode_image
from models.inputs.jpeg_work import pixel_scans
from models.inputs.video import FrameChoice, decode_clip
from service.errors import InvalidInputError, ServiceError, from_library
from service.gateway.dialects.cohere import CohereBody, parse_items
from service.gateway.dialects.tei import EmbedBody, RerankBody, SimilarityBody
from service.gateway.open_inference.codec import parse_infer_request
from service.gateway.openai.inputs import EmbeddingsRequest, parse_inputs
from service.gateway.rest.body import parse_form
from service.key_file import read_keys
from service.limits import Budget, Share
from service.open_inference.inputs import to_inputs
from service.open_inference.shared_memory import SharedMemory
from service.parameters import validate
from service.payloads import parse_json_lines, parse_json_object
from service.rpc.reading import parse
from service.search.collection import check_metadata
from service.settings import Settings
from service.stubs.open_inference_pb2 import ModelInferRequest
from tests.fuzzing import bodies, files, images
from tests.fuzzing.mutations import mutate_value, to_json

LIMITS = ImageLimits(max_pixels=1_000_000)
CLIP = FrameChoice(frames=4, sampling_rate=4)
MAX_ARCHIVE_BYTES = 2**24
MAX_REGION_BYTES = 2**20
METADATA = {"year": 1992, "name": "a", "score": 0.5, "is_good": True, "none": None}
EMBEDDING = {
    "model": "a",
    "input": ["b", {"text": "c"}, {"image": "data:image/png;base64,AA=="}],
    "texts": ["d", "e"],
    "embedding_types": ["float", "int8"],
    "inputs": {"source_sentence": "f", "sentences": ["g"]},
    "query": "h",
    "dimensions": 8,
}
OK = "ok"


def outcome_of(attempt: Callable[[], Any]) -> str:
    """`ok`, or the refusal: an error that Vitrail raises deliberately.

    Raises:
        Exception: any other one, which would be an internal error.
    """
    try:
        attempt()
    except ServiceError as error:
        if error.status == 500:
            raise
        return str(error.status)
    except ModelsError as error:
        # The files of operators have errors of their own; inputs of callers have statuses.
        status = from_library(error).status
        return str(status) if status in (413, 422) else type(error).__name__
    return OK


def try_image(data: bytes) -> None:
    decode_image(data, LIMITS)


def try_header(data: bytes) -> None:
    """What is read of an image's header before a library sees it."""
    canvas_size(data)
    pixel_scans(data)


def try_clip(data: bytes) -> None:
    for _ in decode_clip(data, CLIP, LIMITS):
        pass


def try_archive(data: bytes) -> None:
    read_archive(io.BytesIO(data), MAX_ARCHIVE_BYTES)


def try_head(data: bytes) -> None:
    decode_head(data)


def try_adapter(data: bytes) -> None:
    read_adapter(data)


def try_checkpoint(suffix: str, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        open_container(Path(file.name))


def try_catalog(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        load_catalog(Path(file.name))


def try_keys(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            read_keys(Path(file.name))
        except OSError as error:  # what the command line reports
            raise ModelsError(str(error)) from error


def try_inference(headers: dict[str, str], data: bytes) -> None:
    settings = Settings()
    memory = SharedMemory(settings.shared_memory).of(None)
    # As the server reads headers, which is Latin-1.
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    request = _run(
        parse_infer_request(
            Headers(raw=raw), data, partial(memory.read, limit=MAX_REGION_BYTES), _share()
        )
    )
    to_inputs(request.inputs, settings)


def try_message(kind: Any, data: bytes) -> None:
    parse(kind(), data)


def try_form(data: bytes) -> None:
    content_type = f"multipart/form-data; boundary={bodies.BOUNDARY}"
    form = parse_form(Headers({"content-type": content_type}), data, max_files=8, max_fields=50)
    _run(form)


def try_json(data: bytes) -> None:
    for value in _run(parse_json_lines(data, _share())):
        if isinstance(value, ServiceError):
            raise value


def try_embedding(data: bytes) -> None:
    """A body in the forms of OpenAI, Cohere and TEI: refused if none of them can be."""
    fields = _run(parse_json_object(data, _share()))
    readers: Sequence[Callable[[], Any]] = (
        lambda: parse_inputs(validate(EmbeddingsRequest, fields)),
        lambda: parse_items(validate(CohereBody, fields)),
        *(partial(validate, kind, fields) for kind in (EmbedBody, RerankBody, SimilarityBody)),
    )
    outcomes = [outcome_of(read) for read in readers]
    if OK not in outcomes:
        raise InvalidInputError("none of the forms")


def try_metadata(value: Any) -> None:
    check_metadata(value)


def _share() -> Share:
    return Share(Budget(Settings()), "fuzzing", began=0.0)


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


# By name: tries the input of a number.
PARSERS: dict[str, Callable[[int], None]] = {
    "images, decoded": lambda n: try_image(images.hostile_image(n)),
    "clips": lambda n: try_clip(files.hostile_clip(n)),
    "archives": lambda n: try_archive(files.hostile_archive(n)),
    "heads": lambda n: try_head(files.hostile_head(n)),
    "adapters": lambda n: try_adapter(files.hostile_adapter(n)),
    "checkpoints": lambda n: try_checkpoint(*files.hostile_checkpoint(n)),
    "catalogs": lambda n: try_catalog(bodies.hostile_catalog(n)),
    "key files": lambda n: try_keys(bodies.hostile_keys(n)),
    "inference bodies": lambda n: try_inference(*bodies.hostile_inference(n)),
    "gRPC messages": lambda n: try_message(*bodies.hostile_message(n)),
    "forms": lambda n: try_form(bodies.hostile_form(Random(n), ["image", "model", "texts"])),
    "JSON": lambda n: try_json(to_json(mutate_value(Random(n), METADATA))),
    "embedding bodies": lambda n: try_embedding(to_json(mutate_value(Random(n), EMBEDDING))),
    "metadata": lambda n: try_metadata(mutate_value(Random(n), METADATA)),
}
# Coverage-guided: inputs to begin with, by number, and what is tried with the bytes of a fuzzer.
BYTES: dict[str, tuple[Callable[[int], bytes], Callable[[bytes], None]]] = {
    "heads": (files.hostile_head, try_head),
    "adapters": (files.hostile_adapter, try_adapter),
    "archives": (files.hostile_archive, try_archive),
    "catalogs": (bodies.hostile_catalog, try_catalog),
    "key files": (bodies.hostile_keys, try_keys),
    "inference bodies": (
        lambda n: bodies.hostile_inference(n)[1],
        lambda data: try_inference({}, data),
    ),
    "gRPC messages": (
        lambda n: bodies.hostile_message(n)[1],
        lambda data: try_message(ModelInferRequest, data),
    ),
    "forms": (lambda n: bodies.hostile_form(Random(n), ["image", "model"]), try_form),
    "JSON": (lambda n: to_json(mutate_value(Random(n), METADATA)), try_json),
    "embedding bodies": (lambda n: to_json(mutate_value(Random(n), EMBEDDING)), try_embedding),
    "images": (images.hostile_image, try_header),
    "clips": (files.hostile_clip, try_clip),
    "checkpoints": (
        lambda n: files.hostile_checkpoint(n)[1],
        partial(try_checkpoint, ".safetensors"),
    ),
}


def be_quiet() -> None:
    """Log nothing and warn of nothing, for all of this process."""
    logging.disable()
    warnings.simplefilter("ignore")


def try_numbers(
    name: str, numbers: Sequence[int], place: Path | None = None
) -> tuple[Counter[str], list[str]]:
    """Try inputs of a parser.

    Args:
        place: a file that always has the number of the current input.

    Returns:
        How many had each outcome, and what raised an error that is no refusal.
    """
    attempt: Callable[[int], None] = PARSERS[name]
    outcomes: Counter[str] = Counter()
    failures = []
    for number in numbers:
        if place is not None:
            place.write_text(str(number))
        try:
            outcomes[outcome_of(partial(attempt, number))] += 1
        except Exception as error:
            failures.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
    return outcomes, failures
