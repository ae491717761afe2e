"""Pixels as UINT8 tensors: counted before they are copied, and copied off the event loop."""

import asyncio
import math
import threading
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidInputError, PayloadTooLargeError, UnavailableError
from service.limits import Budget, Share
from service.open_inference.inputs import InputTensor, read_inputs
from service.settings import Settings


def pixels_of(shape: tuple[int, ...]) -> list[InputTensor]:
    return [InputTensor(name="image", datatype="UINT8", shape=shape, raw=bytes(math.prod(shape)))]


def read(tensors: list[InputTensor], settings: Settings, share: Share) -> list[Any]:
    return asyncio.run(read_inputs(tensors, settings, share))


def test_pixels_are_counted_before_they_are_copied() -> None:
    settings = Settings(
        max_bytes_in_flight=10_000, max_request_bytes=10_000, max_image_bytes=5000,
        max_image_side=1000,
    )  # fmt: skip
    budget = Budget(settings)
    with budget.request("http", "") as share:
        share.add(2 * 30 * 40 * 3)
        with pytest.raises(PayloadTooLargeError, match="1001x1"):
            read(pixels_of((1, 1, 1001, 3)), settings, share)
        with pytest.raises(PayloadTooLargeError, match="5054 bytes"):
            read(pixels_of((1, 50, 33, 3)), settings, share)
        with pytest.raises(PayloadTooLargeError, match="1000 images"):
            read(pixels_of((1000, 1, 1, 3)), settings, share)  # of 56,000 bytes as files
        assert budget.bytes == 7200
        with pytest.raises(PayloadTooLargeError, match="all requests together"):
            read(pixels_of((2, 30, 40, 3)), settings, share)
        with budget.request("http", "") as other:
            other.add(2000)
            with pytest.raises(UnavailableError):
                read(pixels_of((1, 10, 39, 3)), settings, share)
        assert budget.bytes == 7200
        [bmp] = read(pixels_of((1, 10, 39, 3)), settings, share)
        assert len(bmp) == share.made_bytes == 54 + 10 * 120
        assert budget.bytes == 7200 + len(bmp)
        lying = [InputTensor(name="image", datatype="UINT8", shape=(1, 2**19, 2**19, 3), raw=b"")]
        with pytest.raises(InvalidInputError):
            read(lying, settings, share)
    assert budget.bytes == 0


def test_pixels_are_copied_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def observed(pixels: np.ndarray) -> bytes:
        threads.append(threading.current_thread())
        return b""

    monkeypatch.setattr("service.open_inference.inputs._as_bmp", observed)
    with Budget(Settings()).request("http", "") as share:
        read(pixels_of((2, 300, 300, 3)), Settings(), share)
    assert threading.main_thread() not in threads
    assert len(threads) == 2
