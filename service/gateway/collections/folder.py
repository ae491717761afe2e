"""Some images of a folder of the server, to be added to a collection by one request."""

import asyncio
from dataclasses import dataclass

from fastapi import Request

from service.errors import InvalidInputError, PayloadTooLargeError, ServiceError
from service.gateway.collections.bodies import Entry, FolderParameters
from service.limits import Share
from service.search.collection import VectorStore
from service.search.folders import ImageFile, ImageFolder
from service.settings import Settings

# Files that a request looks at, and images of them that it embeds.
MAX_FILES = 1000
MAX_ENTRIES = 32


@dataclass(frozen=True, slots=True)
class Page:
    """Files of a folder, in order.

    Args:
        entries: those to add; None for a file that did not change since it was added.
        next: the file after which to go on; None at the end of the folder.
    """

    entries: list[tuple[str, Entry | None]]
    next: str | None


async def read_page(
    request: Request, store: VectorStore, collection: str, parameters: FolderParameters
) -> Page:
    """The first files of the folder, up to a request's number of images or bytes.

    Raises:
        ServiceError: the folder may not be read, or is none.
    """
    settings: Settings = request.app.state.settings
    folder = ImageFolder(settings.image_folders, parameters.folder)
    files = await asyncio.to_thread(folder.files, parameters.after, MAX_FILES)
    known = await store.find(collection, [file.path for file in files])
    share: Share = request.scope["state"]["share"]
    entries: list[tuple[str, Entry | None]] = []
    added = 0
    for file in files:
        if file.path in known and file.is_unchanged(known[file.path]):
            entries.append((file.path, None))
            continue
        full = share.bytes + file.size > settings.max_request_bytes
        if added and (full or added >= min(MAX_ENTRIES, settings.max_images)):
            return Page(entries, entries[-1][0])
        image = await _read(folder, file, settings, share)
        entries.append((file.path, Entry(file.path, image, file.metadata)))
        added += 1
    return Page(entries, files[-1].path if len(files) == MAX_FILES else None)


async def _read(
    folder: ImageFolder, file: ImageFile, settings: Settings, share: Share
) -> bytes | ServiceError:
    """The file's content, counted with what its request holds, or why it cannot be used."""
    try:
        image = await asyncio.to_thread(folder.read, file, settings.max_image_bytes)
        share.add(len(image))
    except (InvalidInputError, PayloadTooLargeError) as error:
        return error
    return image
