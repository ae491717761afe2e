"""What is read of a head's file before anything of it has been checked."""

import json

import pytest

from service import head_file
from service.head_file import METADATA_KEY, trunk_of


def file(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


NAMED = json.dumps({"__metadata__": {METADATA_KEY: json.dumps({"trunk": "tiny"})}}).encode()


def test_a_files_trunk_is_read() -> None:
    assert trunk_of(file(NAMED) + bytes(16)) == "tiny"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        file(b"[" * 100_000),
        file(b"[]"),
        file(b'"\xff"'),
        (2**60).to_bytes(8, "little") + NAMED,
    ],
    ids=["empty", "nested", "no object", "no text", "longer than the file"],
)
def test_what_names_no_trunk_is_left_to_the_later_checks(content: bytes) -> None:
    assert trunk_of(content) == ""


def test_a_header_over_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_file, "MAX_BYTES", len(NAMED) - 1)
    assert trunk_of(file(NAMED)) == ""
