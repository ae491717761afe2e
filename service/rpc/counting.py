"""Counts the values of an encoded message before it is parsed.

A message of 64 MiB can hold millions of empty values, each of which takes memory and time once it
is an object. https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Mapping
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pool import Default

from service.errors import BadRequestError, PayloadTooLargeError

# Fields and elements of messages, nested ones included, without the numbers of tensors.
MAX_VALUES = 50_000
# Elements of packed fields of numbers with a fixed width, which are tensors' contents.
MAX_NUMBERS = 1_000_000
# As deep as protobuf's own parser goes.
MAX_DEPTH = 100

_WIDTHS = {
    FieldDescriptor.CPPTYPE_FLOAT: 4,
    FieldDescriptor.CPPTYPE_DOUBLE: 8,
}


def check_message(message_type: str, content: bytes) -> None:
    """Check the number of values in an encoded message.

    Args:
        message_type: its full name.

    Raises:
        BadRequestError: not a message.
        PayloadTooLargeError: too many values.
    """
    try:
        _Count(content).message(message_type, 0, len(content), 0)
    except IndexError as error:
        raise BadRequestError("the message is truncated") from error


class _Count:
    """A walk over one encoded message.

    Every read is at a position below `len(content)`, or raises IndexError.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._values = 0
        self._numbers = 0

    def message(self, message_type: str, position: int, end: int, depth: int) -> None:
        """Count the fields of the message in `content[position:end]`."""
        if depth > MAX_DEPTH:
            raise BadRequestError("the message is nested too deeply")
        fields = _fields(message_type)
        while position < end:
            self._add(1)
            tag, position = self._varint(position)
            match tag & 7:
                case 0:
                    _, position = self._varint(position)
                case 1:
                    position += 8
                case 5:
                    position += 4
                case 2:
                    size, position = self._varint(position)
                    if position + size > end:
                        raise BadRequestError("the message is truncated")
                    self._field(fields.get(tag >> 3), position, position + size, depth)
                    position += size
                case _:
                    raise BadRequestError("the message has a group, which no field is")
        if position > end:
            raise BadRequestError("the message is truncated")

    def _field(self, kind: str | int | None, position: int, stop: int, depth: int) -> None:
        """Count what a field with a length holds."""
        if isinstance(kind, str):
            self.message(kind, position, stop, depth + 1)
        elif kind == 1:
            self._add(stop - position)  # a varint has at least one byte
        elif kind is not None:
            self._numbers += (stop - position) // kind
            if self._numbers > MAX_NUMBERS:
                raise PayloadTooLargeError(
                    f"the message has more than {MAX_NUMBERS} numbers; send tensors as raw bytes"
                )

    def _add(self, count: int) -> None:
        self._values += count
        if self._values > MAX_VALUES:
            raise PayloadTooLargeError(f"the message has more than {MAX_VALUES} values")

    def _varint(self, position: int) -> tuple[int, int]:
        """The number at a position, and the position after it."""
        value = shift = 0
        while True:
            byte = self._content[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
            if shift > 63:
                raise BadRequestError("the message has a number of more than ten bytes")


@cache
def _fields(message_type: str) -> Mapping[int, str | int | None]:
    """The fields with a length, by number: the type of a message; the least bytes of an element of
    packed numbers; None for bytes and strings."""
    descriptor: Descriptor = Default().FindMessageTypeByName(message_type)
    return {field.number: _kind(field) for field in descriptor.fields}


def _kind(field: FieldDescriptor) -> str | int | None:
    if field.message_type is not None:
        return str(field.message_type.full_name)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return None
    return _WIDTHS.get(field.cpp_type, 1)
