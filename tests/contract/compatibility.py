"""What an interface's stored description has and a newer one lacks or has changed."""

from collections.abc import Iterator
from typing import Any

# Texts for people, which may change.
PROSE = ("description", "summary", "title")


def broken(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """The places of a JSON document where `new` lacks what `old` has, or differs.

    Members may be added, and prose may change. Lists whose elements have a `name` (OpenAPI's
    parameters) are compared by it, and lists of plain values (enum, required) as sets:
    `required` may not grow, all others may.
    """
    match old, new:
        case {"type": _}, {"anyOf": [*kinds], **rest} if "anyOf" not in old:
            # it may become one of several kinds, of which the old one is one
            found = [list(broken(old, {**rest, **kind}, path)) for kind in kinds]
            yield from min(found, key=len)
        case dict(), dict():
            for key, value in old.items():
                if key in PROSE and isinstance(value, str):
                    continue
                where = f"{path}/{key}"
                if key not in new:
                    yield f"{where} is missing"
                elif key == "required" and isinstance(value, list):
                    if set(value) != set(new[key]):
                        yield f"{where} was {value} and is {new[key]}"
                else:
                    yield from broken(value, new[key], where)
            yield from (f"{path}/{key} is new" for key in _new_demands(old, new))
        case list(), list():
            yield from _broken_list(old, new, path)
        case _:
            if type(old) is not type(new) or old != new:
                yield f"{path} was {old!r} and is {new!r}"


def broken_proto(old: str, new: str) -> list[str]:
    """The declarations (messages, fields with their numbers, rpcs, enum values) that `new` lacks,
    each within its message, enum or service."""
    kept = set(_declarations(new))
    return [line for line in _declarations(old) if line not in kept]


def _new_demands(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Bounds that an existing schema did not have, and that would refuse what it accepted."""
    bounds = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "enum",
              "exclusiveMinimum", "exclusiveMaximum", "pattern")  # fmt: skip
    if "type" in old:
        yield from (key for key in bounds if key in new and key not in old)


def _broken_list(old: list[Any], new: list[Any], path: str) -> Iterator[str]:
    if old and all(isinstance(item, dict) and "name" in item for item in old):
        by_name = {item["name"]: item for item in new}
        for item in old:
            where = f"{path}/{item['name']}"
            if item["name"] not in by_name:
                yield f"{where} is missing"
            else:
                yield from broken(item, by_name[item["name"]], where)
        added = by_name.keys() - {item["name"] for item in old}
        yield from (f"{path}/{n} is new and required" for n in sorted(added)
                    if by_name[n].get("required"))  # fmt: skip
    elif all(isinstance(item, dict) for item in old):
        for position, item in enumerate(old):
            if position >= len(new):
                yield f"{path}/{position} is missing"
            else:
                yield from broken(item, new[position], f"{path}/{position}")
    else:
        yield from (f"{path} lacks {item!r}" for item in old if item not in new)


def _declarations(text: str) -> Iterator[str]:
    """Each statement of a proto file, with the blocks that it is in, without comments."""
    blocks: list[str] = []
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    statement = ""
    for line in lines:
        statement = f"{statement} {line}".strip()
        while statement:
            ends = {mark: statement.find(mark) for mark in "{};" if mark in statement}
            if not ends:
                break
            mark = min(ends, key=lambda m: ends[m])
            head = " ".join(statement[: ends[mark]].split())
            statement = statement[ends[mark] + 1 :].strip()
            if mark == "{":
                yield " > ".join([*blocks, head])
                blocks.append(head)
            elif mark == "}":
                blocks.pop()
            elif head:
                yield " > ".join([*blocks, head])
