"""The inputs of OpenAI's embeddings interface, in the forms that servers and clients use.

OpenAI: strings. Infinity: URLs and data URIs with `modality: image`. NVIDIA's NV-CLIP: data URIs
among strings. Jina: objects with `text` or `image`. vLLM: `messages` with parts.
"""

from typing import Any, Literal

from pydantic import BaseModel

from service.errors import InvalidInputError
from service.gateway.embedding import EmbeddingInput, image_input


class EmbeddingsRequest(BaseModel):
    """The members that are read. Others are ignored, because clients send many."""

    model: str | None = None
    input: str | list[Any] | None = None
    messages: list[Any] | None = None
    modality: Literal["text", "image"] = "text"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None  # 0, which Infinity's own client sends by default, is None
    # Other servers have other meanings for it; only true is read.
    truncate: Any = False


def parse_inputs(body: EmbeddingsRequest) -> list[EmbeddingInput]:
    """The inputs to embed, in order.

    Raises:
        InvalidInputError: no input, or one in an unknown form.
    """
    if (body.input is None) == (body.messages is None):
        raise InvalidInputError("send input, or messages", field="input")
    if body.messages is not None:
        return [_of_messages(body.messages)]
    items = [body.input] if isinstance(body.input, str) else body.input or []
    if not items:
        raise InvalidInputError("input is empty", field="input")
    return [_of_item(item, body.modality) for item in items]


def _of_item(item: Any, modality: str) -> EmbeddingInput:
    match item:
        case str() if modality == "image" or item.startswith("data:image/"):
            return image_input(item)
        case str():
            return item
        case {"text": str(text), **rest} if not rest:
            return text
        case {"image": str(image), **rest} if not rest:
            return image_input(image)
        case int() | [int(), *_]:
            raise InvalidInputError("token ids are not supported; send text", field="input")
    raise InvalidInputError(
        'an input is a string, {"text": "..."} or {"image": "URL or base64"}', field="input"
    )


def _of_messages(messages: list[Any]) -> EmbeddingInput:
    """vLLM's form: one user message, whose content is one text or one image."""
    match messages:
        case [{"content": str(text)}]:
            return text
        case [{"content": [{"type": "text", "text": str(text)}]}]:
            return text
        case [{"content": [{"type": "image_url", "image_url": {"url": str(url)}}]}]:
            return image_input(url)
    raise InvalidInputError(
        "messages holds one message with one text or image_url", field="messages"
    )
