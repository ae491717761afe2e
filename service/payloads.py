"""JSON objects and base64 text from request bodies."""

import asyncio
import base64
import binascii
import json
from typing import Any

from service.errors import BadRequestError, InvalidInputError

# Parsing more than this takes milliseconds, so it is done in a thread.
SLOW_JSON_BYTES = 256 * 1024


async def parse_json_object(content: bytes) -> dict[str, Any]:
    """The JSON object of a request body.

    Raises:
        BadRequestError: not JSON, or not an object.
    """
    try:
        if len(content) > SLOW_JSON_BYTES:
            fields = await asyncio.to_thread(json.loads, content)
        else:
            fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequestError("the body is not valid JSON") from error
    if not isinstance(fields, dict):
        raise BadRequestError("the JSON body must be an object")
    return fields


def decode_base64(text: str, field: str) -> bytes:
    """The bytes of base64 text, or of a `data:` URI.

    Raises:
        InvalidInputError: not base64; names `field`.
    """
    _, comma, payload = text.partition(",")
    try:
        return base64.b64decode(payload if comma else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError("base64 does not decode", field=field) from error
