"""Every method of both clients: the requests that it sends, and how it reads their answers.

Nothing here waits. `Client` and `AsyncClient` make methods of these functions; only how they send
a request is their own.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vitrail_client.call import Call, raise_if_all_failed
from vitrail_client.protocol import Entry, Image, Scalar, encode_image, given


def classify(
    images: Sequence[Image], *, model: str | None = None, top_k: int | None = None
) -> Call[list[Entry]]:
    """`{"predictions": [{"index", "label", "score"}]}` for each image, best first."""
    return task("classify", images, model=model, top_k=top_k)


def zero_shot(
    images: Sequence[Image],
    labels: Sequence[str] | None = None,
    *,
    model: str | None = None,
    templates: Sequence[str] | None = None,
    multi_label: bool | None = None,
) -> Call[list[Entry]]:
    """As `classify`, with labels of one's own."""
    return task(
        "zero-shot",
        images,
        labels=labels,
        model=model,
        templates=templates,
        multi_label=multi_label,
    )


def embed(
    images: Sequence[Image],
    *,
    model: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    dimensions: int | None = None,
    truncate: bool | None = None,
) -> Call[list[Entry]]:
    """`{"embedding": [...]}` for each image. `dimensions` of a model that was not trained for it
    need `truncate`."""
    return task(
        "embed",
        images,
        model=model,
        pooling=pooling,
        normalize=normalize,
        dimensions=dimensions,
        truncate=truncate,
    )


def embed_texts(
    texts: Sequence[str], *, model: str | None = None, dimensions: int | None = None
) -> Call[list[Entry]]:
    """`{"embedding": [...]}` for each text, of a model that embeds texts, too."""
    options = given(model=model, dimensions=dimensions)
    return _batched("/embed", texts, lambda batch: {"json": {"texts": list(batch), **options}}, len)


def segment(
    images: Sequence[Image],
    *,
    model: str | None = None,
    output: str | None = None,
    threshold: float | None = None,
    min_area: int | None = None,
    labels: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
) -> Call[list[Entry]]:
    """`{"width", "height", "classes", "mask"}` for each image; `output` is the mask's form."""
    return task(
        "segment",
        images,
        model=model,
        output=output,
        threshold=threshold,
        min_area=min_area,
        labels=labels,
        templates=templates,
    )


def predict(images: Sequence[Image], models: Sequence[str]) -> Call[list[Entry]]:
    """`{"outputs": {model: ...}}` for each image: what each model's own task returns."""
    return task("predict", images, models=models)


def task(name: str, images: Sequence[Image], **options: Any) -> Call[list[Entry]]:
    """An entry for each image, of any task by the name of its route. Options that are None are not
    sent."""
    sent = given(**options)

    def body(batch: Sequence[Image]) -> dict[str, Any]:
        return {"json": {"images": [encode_image(image) for image in batch], **sent}}

    return _batched(f"/{name}", images, body, _image_size)


def models() -> Call[list[dict[str, Any]]]:
    """Every model of the catalog, with its state."""
    return Call(method="GET", path="/models", read=lambda answers: answers[0]["models"])


def create_collection(name: str, *, model: str | None = None) -> Call[dict[str, Any]]:
    """Create a collection, unless it exists with that model."""
    content = {"json": given(model=model)}
    return Call(method="PUT", path=_collection(name), body=lambda _: content, read=_first)


def collections() -> Call[list[dict[str, Any]]]:
    """Every collection, with its model and number of images."""
    return Call(method="GET", path="/collections", read=lambda answers: answers[0]["collections"])


def collection(name: str) -> Call[dict[str, Any]]:
    """One collection, with its model and number of images."""
    return Call(method="GET", path=_collection(name), read=_first)


def delete_collection(name: str) -> Call[None]:
    """Delete a collection with all its images."""
    return Call(method="DELETE", path=_collection(name), read=_first)


def add_images(
    collection: str,
    images: Sequence[Image],
    *,
    ids: Sequence[str] | None = None,
    metadata: Sequence[Mapping[str, Scalar]] | None = None,
    thumbnail: Callable[[Image], bytes | None] | None = None,
) -> Call[list[Entry]]:
    """Add images to a collection: `{"id"}` or `{"error"}` for each.

    Args:
        thumbnail: makes a small JPEG, PNG or WebP of an image, which searches return; None for one
            without. It is called for each image when that is sent.

    Raises:
        ValueError: not as many `ids` or `metadata` as images.
    """
    for name, values in (("ids", ids), ("metadata", metadata)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{len(images)} images and {len(values)} {name}")
    items: list[tuple[Image, dict[str, Any]]] = [
        (
            image,
            given(
                id=None if ids is None else ids[place],
                metadata=None if metadata is None else dict(metadata[place]),
            ),
        )
        for place, image in enumerate(images)
    ]

    def body(batch: Sequence[tuple[Image, dict[str, Any]]]) -> dict[str, Any]:
        return {
            "json": {
                "images": [encode_image(image) | others | small(image) for image, others in batch]
            }
        }

    def small(image: Image) -> dict[str, str]:
        made = None if thumbnail is None else thumbnail(image)
        return {} if made is None else {"thumbnail": base64.b64encode(made).decode()}

    path = f"{_collection(collection)}/images"
    return _batched(path, items, body, lambda item: _image_size(item[0]))


def add_folder(
    collection: str, folder: str, *, after: str | None = None, thumbnails: bool | None = None
) -> Call[dict[str, Any]]:
    """Add the next new or changed images of a folder of the server, if it allows that.

    `{"results", "next"}`: for each file `{"id"}`, `{"id", "unchanged"}` or `{"id", "error"}`. The
    other files come with `after=next`, until that is None. The server makes thumbnails of them,
    unless `thumbnails` is False.
    """
    content = {"json": given(folder=folder, after=after, thumbnails=thumbnails)}
    path = f"{_collection(collection)}/images"
    return Call(method="POST", path=path, body=lambda _: content, read=_first)


def images(
    collection: str, *, after: str | None = None, limit: int | None = None
) -> Call[dict[str, Any]]:
    """The images of a collection by id, at most 1000: `{"images", "next"}`, with `{"id",
    "metadata"}` for each. The other ones come with `after=next`, until that is None."""
    query = {"params": given(after=after, limit=limit)}
    path = f"{_collection(collection)}/images"
    return Call(method="GET", path=path, body=lambda _: query, read=_first)


def delete_image(collection: str, image: str) -> Call[None]:
    """Delete an image from a collection by its id.

    Raises:
        ValueError: the id has a part `.` or `..` between slashes, which URLs lose.
    """
    if not {".", ".."}.isdisjoint(image.split("/")):
        raise ValueError(f"the id {image!r} has a part . or .., which URLs lose")
    path = f"{_collection(collection)}/images/{quote(image)}"
    return Call(method="DELETE", path=path, read=_first)


def delete_images(collection: str, ids: Sequence[str]) -> Call[int]:
    """Delete up to 1000 images from a collection by their ids; how many of them were there."""
    content = {"json": {"ids": list(ids)}}
    path = f"{_collection(collection)}/images/delete"
    return Call(
        method="POST",
        path=path,
        body=lambda _: content,
        read=lambda answers: answers[0]["deleted"],
    )


def search(
    collection: str,
    *,
    image: Image | None = None,
    text: str | None = None,
    vector: Sequence[float] | None = None,
    k: int = 10,
    where: Mapping[str, Scalar] | None = None,
    thumbnails: bool | None = None,
) -> Call[list[dict[str, Any]]]:
    """The images nearest to an image, a text or a vector, best first:
    `{"id", "score", "metadata"}` each, and with `thumbnails` base64 text in `"thumbnail"`, or None.
    `where` holds values that their metadata must have."""

    def body(_: Sequence[Any]) -> dict[str, Any]:
        query = given(
            image=None if image is None else encode_image(image),
            text=text,
            vector=None if vector is None else list(vector),
            thumbnails=thumbnails,
        )
        return {"json": {"k": k, "filter": dict(where or {}), **query}}

    return Call(
        method="POST",
        path=f"{_collection(collection)}/search",
        body=body,
        read=lambda answers: answers[0]["hits"],
    )


def _batched(
    path: str,
    items: Sequence[Any],
    body: Callable[[Sequence[Any]], dict[str, Any]],
    size: Callable[[Any], int],
) -> Call[list[Entry]]:
    """Entries of `results` for all items."""

    def read(answers: list[Any]) -> list[Entry]:
        entries = [entry for answer in answers for entry in answer["results"]]
        raise_if_all_failed(entries)
        return entries

    return Call(method="POST", path=path, items=items, body=body, size=size, read=read)


def _first(answers: list[Any]) -> Any:
    return answers[0]


def _collection(name: str) -> str:
    """The path of a collection.

    Raises:
        ValueError: none can have that name, and the path would be another route's.
    """
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{name!r} cannot be a collection's name")
    return f"/collections/{quote(name, safe='')}"


def _image_size(image: Image) -> int:
    return len(image) if isinstance(image, bytes) else Path(image).stat().st_size
