"""Decoding in processes: the same pixels, and nobody's bad image costs the others anything."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from models.errors import ImageTooLargeError, InputError
from models.inputs.images import ImageLimits, decode_image, decode_reduced
from models.inputs.video import decode_clip
from service.decoding import process as process_module
from service.decoding.pool import MixedDecoder, ProcessDecoder, ThreadDecoder
from service.metrics import Metrics
from service.settings import Settings
from tests.conftest import encode, running, wait_until
from tests.models.test_video import CHOICE, clip

LIMITS = ImageLimits(max_pixels=4_000_000)
CPU_S = 0.5


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture(scope="module")
def decoder(metrics: Metrics) -> Iterator[ProcessDecoder]:
    made = ProcessDecoder(LIMITS, CPU_S, metrics)
    made.start()
    yield made
    made.close()


def deaths(metrics: Metrics, reason: str) -> float:
    name = "vitrail_decoder_deaths_total"
    return metrics.registry.get_sample_value(name, {"reason": reason}) or 0.0


def pixels(decoder: ProcessDecoder, data: bytes) -> np.ndarray:
    with decoder.decoded(data, None) as image:
        return np.array(image)


def endless_jpeg(repeats: int = 20_000) -> bytes:
    """A progressive JPEG whose last scan is repeated: small, and it takes long to decode."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image = Image.fromarray(noise).resize((1400, 1400))
    data = encode(image, progressive=True, quality=30)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last_scan[:64] * repeats + data[-2:]


@pytest.mark.parametrize(
    ("image_format", "mode"),
    [
        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"),
        ("PNG", "1"), ("GIF", "P"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "I;16"),
    ],
)  # fmt: skip
def test_pixels_are_those_of_the_library(
    decoder: ProcessDecoder, photos: dict[str, Image.Image], image_format: str, mode: str
) -> None:
    photo = photos["chelsea"]
    data = encode(
        Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) << 7)
        if mode == "I;16"
        else photo.convert(mode),
        image_format,
    )
    assert np.array_equal(pixels(decoder, data), np.array(decode_image(data)))


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_reduced_and_rotated_photos_are_those_of_the_library(
    decoder: ProcessDecoder, photos: dict[str, Image.Image], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photos["coffee"], exif=exif)
    expected = decode_reduced(data, LIMITS, 64)
    with decoder.decoded(data, 64) as reduced:
        assert (reduced.size, reduced.factor) == (expected.size, expected.factor)
        assert np.array_equal(np.array(reduced.image), np.array(expected.image))


@pytest.mark.parametrize("data", [b"", b"no image", encode(Image.new("RGB", (9, 9)))[:-40]])
def test_errors_are_those_of_the_library(decoder: ProcessDecoder, data: bytes) -> None:
    with pytest.raises(InputError) as expected:
        decode_image(data, LIMITS)
    with pytest.raises(InputError) as caught:
        pixels(decoder, data)
    assert str(caught.value) == str(expected.value)
    assert decoder.pids()


def test_limits_hold_in_the_process(decoder: ProcessDecoder) -> None:
    with pytest.raises(ImageTooLargeError):
        pixels(decoder, encode(Image.new("L", (3000, 3000)), "PNG"))


def test_an_image_over_its_processor_time_is_an_error_of_its_own(
    decoder: ProcessDecoder, metrics: Metrics, jpegs: dict[str, bytes]
) -> None:
    before = deaths(metrics, "time")
    with pytest.raises(InputError, match="processor time"):
        pixels(decoder, endless_jpeg())
    assert deaths(metrics, "time") == before + 1
    assert pixels(decoder, jpegs["coffee"]).shape == (400, 600, 3)


def test_a_killed_process_is_replaced_and_the_image_tried_again(
    decoder: ProcessDecoder, metrics: Metrics, jpegs: dict[str, bytes]
) -> None:
    pixels(decoder, jpegs["coffee"])
    before = deaths(metrics, "crash")
    for pid in decoder.pids():
        os.kill(pid, signal.SIGKILL)
    assert pixels(decoder, jpegs["coffee"]).shape == (400, 600, 3)
    assert deaths(metrics, "crash") == before + 1


def test_a_stopped_process_is_replaced(
    decoder: ProcessDecoder,
    metrics: Metrics,
    jpegs: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_module, "HUNG_S", 1)
    pixels(decoder, jpegs["coffee"])
    before = deaths(metrics, "hung")
    for pid in decoder.pids():
        os.kill(pid, signal.SIGSTOP)
    assert pixels(decoder, jpegs["coffee"]).shape == (400, 600, 3)
    assert deaths(metrics, "hung") == before + 1


def test_a_stopped_process_does_not_keep_its_worker(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "STOP_S", 0.2)
    decoder = ProcessDecoder(ImageLimits(), 5, metrics)
    decoder.start()
    [pid] = decoder.pids()
    os.kill(pid, signal.SIGSTOP)
    decoder.close()
    assert not Path(f"/proc/{pid}").exists()


def test_processes_end_with_their_worker() -> None:
    program = (
        "import os; from prometheus_client import CollectorRegistry;"
        "from models.inputs.images import DEFAULT_LIMITS; from service.metrics import Metrics;"
        "from service.decoding.pool import ProcessDecoder;"
        "d = ProcessDecoder(DEFAULT_LIMITS, 1, Metrics(CollectorRegistry())); d.start();"
        "print(*d.pids(), flush=True); os.kill(os.getpid(), 9)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False
    )
    pid = int(finished.stdout)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in state(pid))


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_frames_are_those_of_the_library(decoder: ProcessDecoder) -> None:
    for count in (40, 2):
        data = clip(count)
        expected = list(decode_clip(data, CHOICE, LIMITS))
        found = [np.array(frame) for frame in decoder.frames(data, CHOICE)]
        assert len(found) == len(expected) == CHOICE.frames
        assert all(map(np.array_equal, found, map(np.array, expected)))


@pytest.mark.parametrize("data", [b"", b"no clip", clip()[:900], clip(size=(4000, 16))])
def test_errors_of_clips_are_those_of_the_library(decoder: ProcessDecoder, data: bytes) -> None:
    limits = replace(LIMITS, max_side=3000)
    with pytest.raises(InputError) as expected:
        list(decode_clip(data, CHOICE, limits))
    decoder = ProcessDecoder(limits, CPU_S, Metrics(CollectorRegistry()))
    with pytest.raises(type(expected.value)) as caught:
        list(decoder.frames(data, CHOICE))
    assert (str(caught.value), caught.value.field) == (str(expected.value), "video")
    decoder.close()


def test_a_clip_goes_on_in_another_process(decoder: ProcessDecoder, metrics: Metrics) -> None:
    data = clip()
    expected = [np.array(frame) for frame in decode_clip(data, CHOICE)]
    before = deaths(metrics, "crash")
    found = []
    for frame in decoder.frames(data, CHOICE):
        found.append(np.array(frame))
        if len(found) == 2:
            for pid in decoder.pids():
                os.kill(pid, signal.SIGKILL)
    assert all(map(np.array_equal, found, expected))
    assert len(found) == len(expected)
    assert deaths(metrics, "crash") > before


def test_the_rest_of_a_clip_may_be_left(decoder: ProcessDecoder) -> None:
    frames = decoder.frames(clip(), CHOICE)
    next(frames)
    busy = set(decoder.pids())
    frames.close()
    assert len(busy - set(decoder.pids())) == 1


def test_the_processes_do_not_know_the_keys(
    monkeypatch: pytest.MonkeyPatch, metrics: Metrics
) -> None:
    monkeypatch.setenv("VITRAIL_API_KEYS", "secret-of-the-worker")
    decoder = ProcessDecoder(LIMITS, CPU_S, metrics)
    decoder.start()
    [pid] = decoder.pids()
    assert b"secret-of-the-worker" not in Path(f"/proc/{pid}/environ").read_bytes()
    decoder.close()


def test_the_processes_never_import_torch() -> None:
    program = "import sys, service.decoding.decoder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_quick_jpegs_are_decoded_in_threads_and_everything_else_in_processes(
    metrics: Metrics, jpegs: dict[str, bytes], photos: dict[str, Image.Image]
) -> None:
    processes = ProcessDecoder(LIMITS, CPU_S, metrics)
    decoder = MixedDecoder(ThreadDecoder(LIMITS), processes)
    assert Settings().decoders == "auto"
    with decoder.decoded(jpegs["coffee"], None) as image:
        assert np.array_equal(np.array(image), np.array(decode_image(jpegs["coffee"])))
    assert not processes.pids()
    with (
        pytest.raises(InputError, match="processor time"),
        decoder.decoded(endless_jpeg(), None),
    ):
        pass
    with decoder.decoded(encode(photos["coffee"], "PNG"), None):
        assert processes.pids()
    decoder.close()


def test_bad_images_at_once_cost_the_others_nothing(
    tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    bad = endless_jpeg()
    assert len(bad) < 2**21
    with running(tiny_catalog, decode_cpu_s=CPU_S) as server, ThreadPoolExecutor(8) as pool:
        server.wait_ready()

        def classify(data: bytes) -> int:
            headers = {"Content-Type": "image/jpeg"}
            return server.client.post("/classify", content=data, headers=headers).status_code

        hostile = [pool.submit(classify, bad) for _ in range(4)]
        good = [pool.submit(classify, jpegs["coffee"]) for _ in range(4)]
        assert [future.result() for future in good] == [200] * 4
        assert [future.result() for future in hostile] == [422] * 4
        assert server.metric("vitrail_decoder_deaths_total", reason="time") == 4
