"""Arrays as the Open Inference Protocol's bytes, and back."""

import numpy as np
import pytest

from service.errors import InvalidInputError
from service.tensors import DTYPES, datatype_of, from_bytes, pack, to_bytes, unpack


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_type_comes_back_as_it_was(datatype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(DTYPES[datatype])
    back = from_bytes("x", datatype_of(array), array.shape, to_bytes(array))
    assert datatype_of(array) == datatype
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


def test_arrays_in_any_order_of_bytes_and_axes_are_sent_in_the_protocols() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert to_bytes(array) == np.array([0, 3, 1, 4, 2, 5], "<i4").tobytes()


def test_texts_are_elements_after_their_length() -> None:
    array = np.array([["cat", "Käse"], ["", "犬"]])
    contents = to_bytes(array)
    assert contents[:7] == b"\x03\x00\x00\x00cat"
    assert np.array_equal(from_bytes("x", "BYTES", (2, 2), contents), array)


def test_bf16_is_the_upper_half_of_float32() -> None:
    values = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    assert np.array_equal(from_bytes("x", "BF16", (4,), halves.tobytes()), values)


@pytest.mark.parametrize(
    ("datatype", "shape", "contents"),
    [
        ("FP32", (2, 2), b"\0" * 12),
        ("FP32", (-1, 2), b"\0" * 8),
        ("FP99", (1,), b"\0" * 8),
        ("BF16", (3,), b"\0" * 4),
        ("BYTES", (2,), pack([b"one"])),
        ("BYTES", (1,), pack([b"one"]) + b"x"),
        ("BYTES", (1,), b"\xff\xff\xff\xff"),
        ("BYTES", (1,), b"\x01\x00"),
        ("BYTES", (0,), pack([b""])),
    ],
)
def test_contents_that_do_not_fit_are_refused(
    datatype: str, shape: tuple[int, ...], contents: bytes
) -> None:
    with pytest.raises(InvalidInputError, match="x: "):
        from_bytes("x", datatype, shape, contents)


def test_elements_may_hold_anything() -> None:
    elements = [b"", b"\x00\x01", bytes(300)]
    assert unpack("x", pack(elements), 3) == elements
