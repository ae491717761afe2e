"""Changes that make bytes and JSON values hostile."""

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

# Integers at which parsers differ.
NUMBERS = (
    -1, 0, 1, 2, 127, 255, 256, 32_767, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**53,
    2**63 - 1, 2**63, 2**64, -(2**63),
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a" * 5000, "../../etc/passwd", "%s%n", "²", "\u202e", "\ud800", "\U0010ffff",
    "None", "NaN", "1e999", "0x10", "[]", "{}", "true", "-0", "1" * 5000, "a,b", "données",
)  # fmt: skip
VALUES: Sequence[Any] = (
    None, True, False, *NUMBERS, 0.5, -1e308, 1e-320, float("nan"), float("inf"), *TEXTS,
    [], {}, [[]], [None], {"": None}, [[[[[[]]]]]], [1, "a", None], list(range(300)),
)  # fmt: skip


def truncate(random: Random, data: bytes) -> bytes:
    """The bytes up to some place."""
    return data[: random.randrange(len(data) + 1)]


def flip(random: Random, data: bytes) -> bytes:
    """The bytes with some bits changed, mostly near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        if changed:
            reach = len(changed) if random.random() < 0.4 else min(len(changed), 64)
            changed[random.randrange(reach)] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(random: Random, data: bytes) -> bytes:
    """The bytes with an integer somewhere that is often a limit."""
    width, order = random.choice((1, 2, 4, 8)), random.choice("<>")
    number = random.choice(NUMBERS) % 2 ** (8 * width)
    content = struct.pack(f"{order}Q", number)
    content = content[:width] if order == "<" else content[-width:]
    reach = len(data) if random.random() < 0.4 else min(len(data), 256)
    place = random.randrange(reach + 1)
    return data[:place] + content + data[place + width :]


def insert(random: Random, data: bytes) -> bytes:
    """The bytes with others in between, or with some of them again."""
    place, size = random.randrange(len(data) + 1), random.choice((1, 2, 7, 64, 1000))
    start = random.randrange(len(data) + 1)
    more = random.randbytes(size) if random.random() < 0.5 else data[start : start + size]
    return data[:place] + more + data[place:]


def remove(random: Random, data: bytes) -> bytes:
    """The bytes without some."""
    place, size = random.randrange(len(data) + 1), random.choice((1, 2, 7, 64, 1000))
    return data[:place] + data[place + size :]


def trail(random: Random, data: bytes) -> bytes:
    """The bytes, and another kind of file after them."""
    tails = (b"PK\x05\x06" + bytes(18), b"<script>alert(1)</script>", b"%PDF-1.4\n", b"\0" * 4096)
    return data + random.choice(tails)


def lead(random: Random, data: bytes) -> bytes:
    """The bytes after another kind of file's start."""
    heads = (
        b"%PDF-1.4\n",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"MZ",
        b"<html>",
        b"\0" * 512,
        b"PK\x03\x04",
    )
    return random.choice(heads) + data


MUTATIONS: Sequence[Callable[[Random, bytes], bytes]] = (
    truncate, flip, overwrite, insert, remove, trail, lead,
)  # fmt: skip


def mutate(random: Random, data: bytes) -> bytes:
    """The bytes after one to three changes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(MUTATIONS)(random, data)
    return data


def mutate_value(random: Random, value: Any, depth: int = 0) -> Any:
    """A JSON value with something else in one place."""
    if random.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return random.choice(VALUES)
    if isinstance(value, list):
        place = random.randrange(len(value))
        return [*value[:place], mutate_value(random, value[place], depth + 1), *value[place + 1 :]]
    key = random.choice(list(value))
    match random.randrange(5):
        case 0:
            return {name: item for name, item in value.items() if name != key}
        case 1:
            return value | {random.choice(TEXTS): random.choice(VALUES)}
    return value | {key: mutate_value(random, value[key], depth + 1)}


def to_json(value: Any) -> bytes:
    """JSON text, also of what JSON does not have."""
    return json.dumps(value).encode("utf-8", "surrogatepass")
