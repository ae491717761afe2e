"""Zip archives that callers send."""

# How a file's entry in an archive's list begins.
ENTRY = b"PK\x01\x02"


def count_members(content: bytes) -> int:
    """The number of files in a zip archive, or more, without reading its list: each entry of that
    takes a thousand bytes of memory and microseconds."""
    return content.count(ENTRY)
