"""The encoded images of a request to a Starlette application."""

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request


async def read_images(request: Request) -> list[bytes]:
    """The body, or every part named `image` of a form."""
    if request.headers["content-type"].startswith("multipart/"):
        async with request.form() as form:
            return read_parts(form)
    return [await request.body()]


def read_parts(form: FormData) -> list[bytes]:
    """Every part named `image`."""
    return [part.file.read() for part in form.getlist("image") if isinstance(part, UploadFile)]
