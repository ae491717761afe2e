"""What a gateway reads of a head's file, without torch."""

import json

# Of a safetensors file: the length of the JSON before the tensors, and the key of a head's members.
LENGTH_BYTES = 8
METADATA_KEY = "vitrail-head"
# Most bytes of that JSON. Longer ones are refused later.
MAX_BYTES = 16 * 2**20


def trunk_of(content: bytes) -> str:
    """The trunk that a head's file names; empty if it is not such a file.

    Reading a long one takes a second, so event loops leave it to a thread.
    """
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    if length > min(MAX_BYTES, len(content) - LENGTH_BYTES):
        return ""
    header = content[LENGTH_BYTES : LENGTH_BYTES + length]
    try:
        return str(json.loads(json.loads(header)["__metadata__"][METADATA_KEY])["trunk"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
