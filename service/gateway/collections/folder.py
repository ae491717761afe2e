"""Some images of a folder of the server, to be added to a collection by one request."""

import asyncio
import time
from concurrent.futures import Executor
from dataclasses import dataclass

from fastapi import Request

from service.errors import (
    DeadlineExceededError,
    InvalidInputError,
    PayloadTooLargeError,
    ServiceError,
)
from service.gateway.collections.bodies import (
    Entry,
)
from service.gateway.collections.parameters import (
    FolderParameters,
)
from service.gateway.collections.thumbnails import ThumbnailMaker
from service.gateway.rest.content import share_of
from service.limits import Share
from service.search.collection import VectorStore
from service.search.folders import ImageFile, ImageFolder, Unreadable
from service.settings import Settings

# Entries that a request looks at, files and folders, and images of them that it embeds.
MAX_FILES = 1000
MAX_ENTRIES = 32
# Of the time to the deadline, for reading and decoding; after it thumbnails are left out.
THUMBNAILS_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class Page:
    """Files of a folder, in order, and folders in it that cannot be read.

    Args:
        entries: those to add; None for a file that did not change since it was added.
        next: the path after which to go on; None at the end of the folder.
    """

    entries: list[tuple[str, Entry | None]]
    next: str | None


async def read_page(
    request: Request,
    store: VectorStore,
    collection: str,
    parameters: FolderParameters,
    deadline: float,
) -> Page:
    """The first files of the folder, up to a request's number of images or bytes.

    Args:
        deadline: in `time.monotonic` seconds. A thread that waits for a network mount that hangs
            goes on, but no request waits for it any longer.

    Raises:
        ServiceError: the folder may not be read, is none, or does not answer in time.
    """
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await _read_page(request, store, collection, parameters, deadline)
    except TimeoutError as error:
        raise DeadlineExceededError("the deadline passed before the folder was read") from error


async def _read_page(
    request: Request,
    store: VectorStore,
    collection: str,
    parameters: FolderParameters,
    deadline: float,
) -> Page:
    settings: Settings = request.app.state.settings
    folder = ImageFolder(settings.image_folders, parameters.folder)
    share = share_of(request)
    threads: Executor = request.app.state.folder_threads
    thumbnails: ThumbnailMaker = request.app.state.thumbnails
    files, last = await share.in_pool(threads, folder.look, parameters.after, MAX_FILES, deadline)
    known = await store.find(collection, [file.path for file in files])
    entries: list[tuple[str, Entry | None]] = []
    now = time.monotonic()
    thumbnails_end = now + THUMBNAILS_SHARE * (deadline - now)
    added = 0
    for file in files:
        if isinstance(file, ImageFile) and file.is_unchanged(known.get(file.path, {})):
            entries.append((file.path, None))
            continue
        size = file.size if isinstance(file, ImageFile) else 0
        full = share.bytes + size > settings.max_request_bytes
        if added and (full or added >= min(MAX_ENTRIES, settings.max_images)):
            return Page(entries, entries[-1][0])
        if isinstance(file, Unreadable):
            entry = Entry(file.path, file.error, {})
        else:
            image = await _read(threads, folder, file, settings, share)
            thumbnail = None
            wanted = parameters.thumbnails and time.monotonic() < thumbnails_end
            if wanted and isinstance(image, bytes):
                thumbnail = await share.in_pool(threads, thumbnails.make, image)
            entry = Entry(file.path, image, file.metadata, thumbnail)
        entries.append((file.path, entry))
        added += 1
    return Page(entries, last)


async def _read(
    threads: Executor, folder: ImageFolder, file: ImageFile, settings: Settings, share: Share
) -> bytes | ServiceError:
    """The file's content, counted with what its request holds, or why it cannot be used."""
    limit = settings.max_image_bytes
    size = min(file.size, limit)
    try:
        share.add(size)  # before it is read: that goes on when the request is cancelled
    except PayloadTooLargeError as error:
        return error.kept()
    try:
        image = await share.in_pool(threads, folder.read, file, limit)
        share.add(len(image) - size)  # it may have changed meanwhile
    except (InvalidInputError, PayloadTooLargeError) as error:
        share.remove(size)
        return error.kept()
    return image
