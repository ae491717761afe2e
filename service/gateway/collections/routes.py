"""Collections as a resource: images are added, and found by image, text or vector."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as PathParameter

from service.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    PayloadTooLargeError,
    ServiceError,
)
from service.gateway import dispatch
from service.gateway.auth import require_collection_key
from service.gateway.collections.bodies import (
    FORM,
    Entry,
    read_entries,
    read_list,
    read_query,
)
from service.gateway.collections.folder import read_page
from service.gateway.collections.openapi import ADD, CREATE, DELETE, LIST, SEARCH
from service.gateway.collections.parameters import (
    CollectionParameters,
    DeletionParameters,
    FolderParameters,
)
from service.gateway.collections.vectors import (
    check_current,
    check_digests,
    embed,
    unit_vector,
    vector_of,
)
from service.gateway.entrance import refused_early
from service.gateway.json_response import JsonResponse
from service.gateway.problems import describe
from service.gateway.rest.content import read_body, read_json, share_of
from service.gateway.rest.examples import PHOTO
from service.parameters import validate
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
    fields = await parse_json_object(content or b"{}", share_of(request))
    parameters = validate(CollectionParameters, fields)
    store = await _store(request)
    check_name(name)
    example = decode_base64(PHOTO, "images")  # a model's digests and dimensions come with an answer
    result = await embed(request, parameters.model, [example], deadline)
    used, vector = result.models[0], vector_of(result.images[0])
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
    check_digests(found, result)
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


@router.get("/collections/{name}/images", openapi_extra=LIST)
async def list_images(request: Request, name: Name) -> dict[str, Any]:
    """List the images by id, each with its metadata; `next` is `after` of the next request."""
    store = await _store(request)
    await _get(store, name)
    parameters = read_list(request)
    found = await store.images(name, parameters.after, parameters.limit)
    images = [{"id": image, "metadata": metadata} for image, metadata in found.items()]
    more = len(images) == parameters.limit
    return {"images": images, "next": images[-1]["id"] if more else None}


@router.post("/collections/{name}/images", openapi_extra=ADD)
@refused_early("embed", scope="collections", patient=True)
async def add_images(request: Request, name: Name) -> JsonResponse:
    """Embed images and add them: parts `image`, one raw image, JSON's `images`, or a line of NDJSON
    each. They may have an `id`, else it is made from the content, and `metadata`; in JSON and
    NDJSON also a `thumbnail`, which searches return. One with an id that is there replaces the
    other.

    JSON's `folder` adds the first new or changed images of a folder of the server, if it allows
    that: their ids are the files' paths, and `next` is `after` of the next request."""
    deadline = dispatch.read_deadline(request)
    store = await _store(request)
    collection, count = await _get(store, name)
    entries = await read_entries(request)
    if not isinstance(entries, FolderParameters):
        results = await _add(request, store, collection, count, entries, deadline)
        return JsonResponse({"model": collection.model, "results": results})
    page = await read_page(request, store, name, entries, deadline)
    new = [entry for _, entry in page.entries if entry is not None]
    added = await _add(request, store, collection, count, new, deadline, alone=False) if new else []
    in_order = iter(added)
    results = [
        {"id": path, "unchanged": True} if entry is None else next(in_order)
        for path, entry in page.entries
    ]
    return JsonResponse({"model": collection.model, "results": results, "next": page.next})


@router.delete("/collections/{name}/images/{image:path}", status_code=204)
async def delete_image(request: Request, name: Name, image: ImageId) -> None:
    """Delete an image by its id."""
    store = await _store(request)
    await _get(store, name)
    if not await store.remove(name, [check_id(image)]):
        raise NotFoundError(f"no image {image!r} in the collection {name!r}", field="image")


@router.post("/collections/{name}/images/delete", openapi_extra=DELETE)
async def delete_images(request: Request, name: Name) -> dict[str, int]:
    """Delete up to 1000 images by their ids; `deleted` is how many of them were there."""
    parameters = validate(DeletionParameters, await read_json(request))
    store = await _store(request)
    await _get(store, name)
    return {"deleted": await store.remove(name, list(map(check_id, parameters.ids)))}


@router.post("/collections/{name}/search", openapi_extra=SEARCH)
@refused_early("embed", scope="collections", media=("image/", FORM))  # JSON may hold a vector
async def search(request: Request, name: Name) -> dict[str, Any]:
    """Find the images nearest to one image, `text` or `vector`, by cosine similarity, best first.
    `filter` holds values that their metadata must have."""
    deadline = dispatch.read_deadline(request)
    store = await _store(request)
    collection, _ = await _get(store, name)
    query = await read_query(request)
    if isinstance(query.by, np.ndarray):
        await check_current(request, collection)
        vector = unit_vector(query.by, collection)
    else:
        result = await embed(request, collection.model, [query.by], deadline)
        check_digests(collection, result)
        vector = vector_of(result.images[0])
    hits = await store.search(
        collection, vector, query.count, query.where, thumbnails=query.thumbnails
    )
    found: list[dict[str, Any]] = [
        {"id": hit.id, "score": _cosine(hit.score), "metadata": hit.metadata} for hit in hits
    ]
    if query.thumbnails:
        for entry, hit in zip(found, hits, strict=True):
            entry["thumbnail"] = hit.thumbnail and base64.b64encode(hit.thumbnail).decode()
    return {"model": collection.model, "hits": found}


def _cosine(score: float) -> float:
    """A score that rounding has taken out of a cosine's range, back in it."""
    return min(max(score, -1.0), 1.0)


async def _store(request: Request) -> VectorStore:
    store: VectorStore = await request.app.state.collections.get()
    return store


async def _get(store: VectorStore, name: str) -> tuple[Collection, int]:
    try:
        return await store.get(check_name(name))
    except InvalidInputError as error:  # no collection can have this name
        raise NotFoundError(f"no collection {name!r}", field="name") from error


async def _add(
    request: Request,
    store: VectorStore,
    collection: Collection,
    count: int,
    entries: Sequence[Entry],
    deadline: float,
    *,
    alone: bool = True,
) -> list[dict[str, Any]]:
    """Add images to a collection that has `count`; a result for each.

    Args:
        alone: as for `InferResult.raise_if_all_failed`.
    """
    if count + len(entries) > MAX_IMAGES:
        raise PayloadTooLargeError(f"a collection holds at most {MAX_IMAGES} images")
    inputs = [entry.image for entry in entries]
    result = await embed(request, collection.model, inputs, deadline, bulk=len(entries) > 1)
    check_digests(collection, result)
    result.raise_if_all_failed(alone=alone)
    items: dict[str, Item] = {}
    results: list[dict[str, Any]] = []
    for entry, image in zip(entries, result.images, strict=True):
        try:
            vector = vector_of(image)
            items[entry.id] = Item(entry.id, vector, entry.metadata, entry.thumbnail)
            results.append({"id": entry.id})
        except ServiceError as error:
            results.append(_failed(entry, error))
    if items:
        await store.add(collection, list(items.values()))
    return results


def _failed(entry: Entry, error: ServiceError) -> dict[str, Any]:
    return {"error": describe(error)} | ({"id": entry.id} if entry.id else {})
