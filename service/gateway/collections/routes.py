"""Collections as a resource: images are added, and found by image, text or vector."""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as PathParameter

from models.inputs.types import Input
from service.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    PayloadTooLargeError,
    QueueFullError,
    ServiceError,
)
from service.gateway import dispatch
from service.gateway.auth import require_collection_key
from service.gateway.collections.bodies import (
    CollectionParameters,
    Entry,
    read_entries,
    read_query,
)
from service.gateway.collections.openapi import ADD, CREATE, SEARCH
from service.gateway.entrance import refused_early
from service.gateway.problems import describe
from service.gateway.rest.content import read_body
from service.gateway.rest.examples import PHOTO
from service.parameters import validate, validated_call
from service.payloads import decode_base64, parse_json_object
from service.search.collection import (
    MAX_COLLECTIONS,
    MAX_IMAGES,
    Collection,
    Item,
    VectorStore,
    check_id,
    check_name,
)
from service.types import ImageResult, InferRequest, InferResult

router = APIRouter(tags=["collections"], dependencies=[Depends(require_collection_key)])

Name = Annotated[str, PathParameter(examples=["photos"])]
ImageId = Annotated[str, PathParameter(examples=["astronaut"])]


@router.put(
    "/collections/{name}", openapi_extra=CREATE, responses={201: {"description": "Created."}}
)
async def create_collection(request: Request, response: Response, name: Name) -> dict[str, Any]:
    """Create a collection of images that `model` embeds: 201. If it exists with that model: 200."""
    deadline = dispatch.read_deadline(request)
    content = await read_body(request)
    parameters = validate(CollectionParameters, await parse_json_object(content or b"{}"))
    store = await _store(request)
    check_name(name)
    example = decode_base64(PHOTO, "images")  # a model's digests and dimensions come with an answer
    result = await _embed(request, parameters.model, [example], deadline)
    used, vector = result.models[0], _vector(result.images[0])
    wanted = Collection(
        name=name,
        model=used.name,
        model_digest=used.model_digest,
        preprocess_digest=used.preprocess_digest,
        dimensions=len(vector),
    )
    if len(await store.collections()) >= MAX_COLLECTIONS:
        raise PayloadTooLargeError(f"there are {MAX_COLLECTIONS} collections; delete one first")
    response.status_code = 201 if await store.create(wanted) else 200
    found, count = await store.get(name)
    if found.model != wanted.model:
        raise ConflictError(f"the collection {name!r} is there with the model {found.model}")
    _check_digests(found, result)
    return found.to_json(count)


@router.get("/collections")
async def list_collections(request: Request) -> dict[str, Any]:
    """List the collections, each with its model and number of images."""
    found = await (await _store(request)).collections()
    return {"collections": [collection.to_json(count) for collection, count in found]}


@router.get("/collections/{name}")
async def get_collection(request: Request, name: Name) -> dict[str, Any]:
    """Describe a collection."""
    collection, count = await _get(await _store(request), name)
    return collection.to_json(count)


@router.delete("/collections/{name}", status_code=204)
async def delete_collection(request: Request, name: Name) -> None:
    """Delete a collection with all its images."""
    store = await _store(request)
    await _get(store, name)
    await store.delete(name)


@router.post("/collections/{name}/images", openapi_extra=ADD)
@refused_early("embed", scope="collections", always=False)
async def add_images(request: Request, name: Name) -> dict[str, Any]:
    """Embed images and add them: parts `image`, one raw image, JSON's `images`, or a line of NDJSON
    each. They may have an `id`, else it is made from the content, and `metadata`. One with an id
    that is there replaces the other."""
    deadline = dispatch.read_deadline(request)
    store = await _store(request)
    collection, count = await _get(store, name)
    entries = await read_entries(request)
    if count + len(entries) > MAX_IMAGES:
        raise PayloadTooLargeError(f"a collection holds at most {MAX_IMAGES} images")
    inputs = [entry.image for entry in entries]
    result = await _embed(request, collection.model, inputs, deadline, bulk=len(entries) > 1)
    _check_digests(collection, result)
    result.raise_if_all_failed()
    items: dict[str, Item] = {}
    results: list[dict[str, Any]] = []
    for entry, image in zip(entries, result.images, strict=True):
        try:
            items[entry.id] = Item(entry.id, _vector(image), entry.metadata)
            results.append({"id": entry.id})
        except ServiceError as error:
            results.append(_failed(entry, error))
    if items:
        await store.add(name, list(items.values()))
    return {"model": collection.model, "results": results}


@router.delete("/collections/{name}/images/{image:path}", status_code=204)
async def delete_image(request: Request, name: Name, image: ImageId) -> None:
    """Delete an image by its id."""
    store = await _store(request)
    await _get(store, name)
    if not await store.remove(name, check_id(image)):
        raise NotFoundError(f"no image {image!r} in the collection {name!r}", field="image")


@router.post("/collections/{name}/search", openapi_extra=SEARCH)
@refused_early("embed", scope="collections", always=False)
async def search(request: Request, name: Name) -> dict[str, Any]:
    """Find the images nearest to one image, `text` or `vector`, by cosine similarity, best first.
    `filter` holds values that their metadata must have."""
    deadline = dispatch.read_deadline(request)
    store = await _store(request)
    collection, _ = await _get(store, name)
    query = await read_query(request)
    if isinstance(query.by, np.ndarray):
        await _check_current(request, collection)
        vector = _unit(query.by, collection)
    else:
        result = await _embed(request, collection.model, [query.by], deadline)
        _check_digests(collection, result)
        vector = _vector(result.images[0])
    hits = await store.search(name, vector, query.count, query.where)
    found = [{"id": hit.id, "score": hit.score, "metadata": hit.metadata} for hit in hits]
    return {"model": collection.model, "hits": found}


async def _store(request: Request) -> VectorStore:
    store: VectorStore = await request.app.state.collections.get()
    return store


async def _get(store: VectorStore, name: str) -> tuple[Collection, int]:
    try:
        return await store.get(check_name(name))
    except InvalidInputError as error:  # no collection can have this name
        raise NotFoundError(f"no collection {name!r}", field="name") from error


async def _embed(
    request: Request,
    model: str | None,
    inputs: Sequence[Input | ServiceError],
    deadline: float,
    *,
    bulk: bool = False,
) -> InferResult:
    """Embed inputs, a chunk at a time; bulk ones wait while the queue is full."""
    size = request.app.state.settings.max_images
    images: list[ImageResult] = []
    with dispatch.count_request(request, "embed") as account:
        for start in range(0, len(inputs), size):
            chunk = InferRequest(
                inputs=inputs[start : start + size],
                calls=[validated_call(model, "embed", {})],
                deadline=deadline,
                bulk=bulk,
            )
            while True:
                try:
                    result = await dispatch.infer(request, chunk, account)
                    break
                except QueueFullError as error:
                    wait_s = min(error.retry_after_s or 1, 1.0)
                    if not bulk or time.monotonic() + wait_s >= deadline:
                        raise
                    await asyncio.sleep(wait_s)
            images += result.images
        result = InferResult(result.models, images)
        account.answered(result)
    return result


def _vector(image: ImageResult) -> np.ndarray:
    """An input's embedding.

    Raises:
        ServiceError: the input's error.
    """
    output = image.error or image.outputs[0]
    if isinstance(output, ServiceError):
        raise output
    return output["embedding"]


def _unit(vector: np.ndarray, collection: Collection) -> np.ndarray:
    if vector.shape != (collection.dimensions,):
        raise InvalidInputError(
            f"the vector has {vector.size} numbers; the collection's have {collection.dimensions}",
            field="vector",
        )
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not 0 < length < float("inf"):
        raise InvalidInputError("the vector has no direction", field="vector")
    return (vector / length).astype(np.float32)


def _check_digests(collection: Collection, result: InferResult) -> None:
    """Check that an answer came from the version of the model that embedded the collection.

    Raises:
        ConflictError: it is another one.
    """
    _compare(collection, result.models[0].model_digest)


async def _check_current(request: Request, collection: Collection) -> None:
    """As `_check_digests`, for queries that need no answer of the model."""
    model = await request.app.state.backend.model(collection.model)
    if model.model_digest is not None:
        _compare(collection, model.model_digest)


def _compare(collection: Collection, model_digest: str) -> None:
    # The model's digest covers its transform. An answer's preprocess_digest is that of its inputs,
    # so texts and images have different ones.
    if model_digest != collection.model_digest:
        raise ConflictError(
            f"another version of the model {collection.model} embedded the collection "
            f"{collection.name!r} ({collection.model_digest[:19]}...); create it again"
        )


def _failed(entry: Entry, error: ServiceError) -> dict[str, Any]:
    return {"error": describe(error)} | ({"id": entry.id} if entry.id else {})
