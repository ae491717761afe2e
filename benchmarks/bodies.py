"""Request bodies of one or more images, in the forms that the compared servers take."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BOUNDARY = "benchmark-5d1f0c7a"


@dataclass(frozen=True, slots=True)
class Body:
    content: bytes
    media_type: str


Encoder = Callable[[Sequence[bytes]], Body]


def image_or_form(images: Sequence[bytes]) -> Body:
    """One image as the body, several as a form."""
    return Body(images[0], "image/jpeg") if len(images) == 1 else form(images)


def form(images: Sequence[bytes]) -> Body:
    """A form in which every part is named `image`."""
    return _multipart(["image"] * len(images), images)


def plural_form(images: Sequence[bytes]) -> Body:
    """A form in which every part is named `images`."""
    return _multipart(["images"] * len(images), images)


def image_or_numbered_form(images: Sequence[bytes]) -> Body:
    """One image as the body, several as a form whose parts are named `000`, `001`, ..."""
    if len(images) == 1:
        return Body(images[0], "image/jpeg")
    return _multipart([f"{number:03}" for number in range(len(images))], images)


def open_inference(images: Sequence[bytes]) -> Body:
    """A JSON request of the Open Inference Protocol with base64 texts."""
    texts = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "shape": [len(texts), 1], "datatype": "BYTES", "data": texts}
    return Body(json.dumps({"inputs": [tensor]}).encode(), "application/json")


def _multipart(names: Sequence[str], images: Sequence[bytes]) -> Body:
    parts = b"".join(
        (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="image.jpg"'
            "\r\nContent-Type: image/jpeg\r\n\r\n"
        ).encode()
        + image
        + b"\r\n"
        for name, image in zip(names, images, strict=True)
    )
    content = parts + f"--{BOUNDARY}--\r\n".encode()
    return Body(content, f"multipart/form-data; boundary={BOUNDARY}")
