"""What a gateway reads of a head's file, without torch."""

import json

# Of a safetensors file: the length of the JSON before the tensors, and the key of a head's members.
LENGTH_BYTES = 8
METADATA_KEY = "vitrail-head"


def trunk_of(content: bytes) -> str:
    """The trunk that a head's file names; empty if it is not such a file."""
    end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    try:
        members = json.loads(json.loads(content[LENGTH_BYTES:end])["__metadata__"][METADATA_KEY])
        return str(members["trunk"])
    except (ValueError, LookupError, TypeError):
        return ""
