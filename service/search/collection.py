"""What a collection is, and the interface of the stores that hold them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from service.errors import ConflictError, InvalidInputError

MAX_COLLECTIONS = 1000
MAX_IMAGES = 10_000_000
MAX_HITS = 1000
MAX_ID = 512
MAX_FIELDS = 32
MAX_FIELD_NAME = 64
MAX_TEXT = 1024
MAX_THUMBNAIL = 16 * 1024

# How a thumbnail's bytes begin: JPEG, PNG, WebP.
_THUMBNAIL = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP", re.DOTALL)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

# A value of a metadata field. No lists or objects, so that a filter means the same in every store.
Scalar = str | int | float | bool | None
Metadata = Mapping[str, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Images that one model embedded. Another version of the model has another digest."""

    name: str
    model: str
    model_digest: str
    preprocess_digest: str
    dimensions: int

    def to_json(self, images: int) -> dict[str, Any]:
        """The collection as routes return it, with its number of images."""
        return asdict(self) | {"images": images}


@dataclass(frozen=True, slots=True)
class Item:
    """An image: its id, its (D,) float32 embedding of unit length, its metadata, and a small JPEG,
    PNG or WebP to show it by."""

    id: str
    embedding: np.ndarray
    metadata: Metadata = field(default_factory=dict)
    thumbnail: bytes | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """An image that was found; `score` is the cosine similarity. `thumbnail` is None if the image
    has none, or it was not asked for."""

    id: str
    score: float
    metadata: Metadata
    thumbnail: bytes | None = None


class VectorStore(Protocol):
    """Stores collections. What a method has stored survives the end of the process.

    Methods of a collection that does not exist raise NotFoundError. Those that take what a model
    made take the collection that it was made for, and raise ConflictError if there is another one
    of that name by now.
    """

    async def create(self, collection: Collection) -> bool:
        """Create a collection; False if one of that name exists."""

    async def collections(self) -> Sequence[tuple[Collection, int]]:
        """Every collection with its number of images, by name."""

    async def get(self, name: str) -> tuple[Collection, int]:
        """One collection, and its number of images."""

    async def delete(self, name: str) -> None:
        """Delete a collection."""

    async def add(self, collection: Collection, items: Sequence[Item]) -> None:
        """Add images, whose ids differ; one with an id that is there replaces the other."""

    async def remove(self, name: str, images: Sequence[str]) -> int:
        """Delete images by their ids; the number of those that were there."""

    async def images(self, name: str, after: str, count: int) -> Mapping[str, Metadata]:
        """The metadata of the first `count` images whose ids come after `after`, by id. The order
        of ids is the store's own."""

    async def find(self, name: str, ids: Sequence[str]) -> Mapping[str, Metadata]:
        """The metadata of those of these images that are there, by id."""

    async def search(
        self,
        collection: Collection,
        query: np.ndarray,
        count: int,
        where: Metadata,
        *,
        thumbnails: bool = False,
    ) -> Sequence[Hit]:
        """The nearest images whose metadata has all values of `where`, best first.

        Args:
            query: (D,) float32 of unit length.
            thumbnails: return the images' thumbnails, too.
        """

    async def close(self) -> None:
        """Close files and connections."""


def check_same(wanted: Collection, found: Collection) -> None:
    """
    Raises:
        ConflictError: the collection that was found is another one.
    """
    if found != wanted:
        raise ConflictError(f"the collection {wanted.name!r} was created anew meanwhile")


def check_name(name: str) -> str:
    """The name of a new collection.

    Raises:
        InvalidInputError: it cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"{name!r} cannot be a collection's name: at most 63 of a-z, 0-9, _ and -, and the "
            "first one is a letter or a digit",
            field="name",
        )
    return name


def check_id(value: object) -> str:
    """An image's id from a request.

    Raises:
        InvalidInputError: it cannot be one.
    """
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID or not value.isprintable():
        raise InvalidInputError(f"an id is text of 1 to {MAX_ID} printable characters", field="id")
    return value


def check_new_id(value: object) -> str:
    """The id of an image to add. It becomes a part of its URL.

    Raises:
        InvalidInputError: it cannot be one.
    """
    name = check_id(value)
    if not {".", ".."}.isdisjoint(name.split("/")):
        raise InvalidInputError("an id has no part . or .. between slashes", field="id")
    return name


def check_thumbnail(content: bytes) -> bytes:
    """An image's thumbnail from a request. It is kept as it is and not decoded.

    Raises:
        InvalidInputError: it is too large, or in another format.
    """
    if len(content) > MAX_THUMBNAIL or not _THUMBNAIL.match(content):
        raise InvalidInputError(
            f"a thumbnail is a JPEG, PNG or WebP of at most {MAX_THUMBNAIL} bytes",
            field="thumbnail",
        )
    return content


def check_metadata(value: object, name: str = "metadata") -> dict[str, Scalar]:
    """Metadata, or a filter, from a request.

    Raises:
        InvalidInputError: not an object of scalars, or over a limit; names the field `name`.
    """
    if not isinstance(value, Mapping) or len(value) > MAX_FIELDS:
        raise InvalidInputError(f"{name} is an object of at most {MAX_FIELDS} fields", field=name)
    for key, item in value.items():
        if not 0 < len(key) <= MAX_FIELD_NAME or not key.isprintable():
            raise InvalidInputError(
                f"{name}: a field's name has 1 to {MAX_FIELD_NAME} printable characters", field=name
            )
        match item:
            case None | bool():
                continue
            case str() if len(item) <= MAX_TEXT and "\0" not in item and _is_unicode(item):
                continue
            case int() | float() if abs(item) < 2**53:  # neither infinite nor NaN, nor too long
                continue
        raise InvalidInputError(
            f"{name}.{key} is a text of at most {MAX_TEXT} characters, a number, true, false or "
            "null",
            field=name,
        )
    return dict(value)


def _is_unicode(text: str) -> bool:
    """Whether the text can be stored: JSON can hold halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def canonical(value: Scalar) -> str:
    """A value as JSON text, the same for numbers that are equal."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)
