"""The transform `gpu`, on CPU tensors: its pixels, which files wait for their batch, how a batch is
decoded, and where the transform is refused.
What only a GPU does is in docs/guides/gpu-measuring.md."""

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from models import Registry
from models.errors import CatalogError, ImageTooLargeError, InputError
from models.inputs import nvjpeg
from models.inputs.images import DEFAULT_LIMITS, ImageLimits, decode_image
from models.inputs.jpeg_file import JpegFile, open_jpeg, without_metadata
from models.inputs.normalize import Normalize
from models.inputs.tensor_transform import TensorTransform
from models.inputs.transforms import Preprocess, create_transform
from models.trunks import jpeg_batch
from models.trunks.jpeg_batch import JpegBatch, JpegInputs
from tests.conftest import encode
from tests.models.test_no_waiting import GPU, NoWaiting, fake_gpu

CPU = torch.device("cpu")
SPEC = Preprocess(transform="gpu")
SPECS = (
    Preprocess(),
    Preprocess(crop_pct=1.0, interpolation="bilinear"),
    Preprocess(input_size=(96, 160)),
    Preprocess(input_size=(225, 225), crop_early=True),
    Preprocess(crop_mode="squash", input_size=(96, 160), crop_pct=0.5),
    Preprocess(crop_mode="border"),
)


def decode_jpegs(files: Sequence[bytes]) -> list[Tensor]:
    """A stand-in for torchcodec's decoder: all files, or RuntimeError."""
    decoded = []
    for data in files:
        try:
            is_grey = simplejpeg.decode_jpeg_header(data)[2] == "Gray"
            pixels_HWC = simplejpeg.decode_jpeg(data, "GRAY" if is_grey else "RGB")
        except ValueError as error:
            raise RuntimeError(f"Failed to decode batch: {error}") from error
        decoded.append(torch.from_numpy(pixels_HWC).permute(2, 0, 1))
    return decoded


def jpeg_inputs(spec: Preprocess) -> JpegInputs:
    transform = create_transform(spec)
    assert isinstance(transform, TensorTransform)
    return JpegInputs(spec, transform, CPU)


@pytest.fixture(params=["stand-in", "torchcodec"])
def inputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> JpegInputs:
    """The inputs of a trunk on a device that decodes files: the CPU, which is refused otherwise."""
    decode: nvjpeg.DecodeJpegs = decode_jpegs
    if request.param == "torchcodec":
        pytest.importorskip("torchcodec", reason="pip install 'vitrail[gpu]'")
        decode = nvjpeg.torchcodec_decoder(CPU)
    monkeypatch.setattr(jpeg_batch, "create_jpeg_decoder", lambda device: decode)
    return jpeg_inputs(SPEC)


def opened(inputs: JpegInputs, data: bytes) -> JpegFile:
    file = inputs.open(data, DEFAULT_LIMITS)
    assert file is not None
    return file


def batch_of(inputs: JpegInputs, *files: bytes) -> JpegBatch:
    return JpegBatch(inputs, {row: opened(inputs, data) for row, data in enumerate(files)}, {})


def damaged(data: bytes) -> bytes:
    """The file with a scan of a component that it does not have: all that is checked is whole."""
    component = data.index(b"\xff\xda") + 5
    return data[:component] + b"\x09" + data[component + 1 :]


def doubtful_files(data: bytes) -> dict[str, bytes]:
    """A file changed in ways that decoders need not agree about."""
    frame, huffman, tables, scan = (data.index(bytes((0xFF, m))) for m in (0xC0, 0xC4, 0xDB, 0xDA))
    body = data.index(b"\0\x3f\0", scan) + 3
    large = data[frame : frame + 5] + b"\xff\xff\xff\xff" + data[frame + 9 : huffman]
    # With the fill byte's marker as a length, one comes from here to the other frame.
    behind = data[:2] + b"\xff" + large
    comment = 2 + 2 + 0xC000 - len(behind) - 2
    stated = data[: frame + 5] + b"\x02\0\x02\0" + data[frame + 9 :]  # 512x512
    return {
        "a frame behind a fill byte": b"".join(
            [behind, b"\xff\xfe", comment.to_bytes(2), bytes(comment - 2), data[2:]]
        ),
        "two frames": data[:frame] + large + data[frame:],
        "a marker of nothing": data[:2] + b"\xff\xf0\0\x02" + data[2:],
        "an end before the end": data[: body + 20] + b"\xff\xd9" + data[body + 20 :],
        "too few coded bytes": stated,
        "no coded bytes": data[:body] + b"\xff\xd9",
        "no Huffman tables": data[:huffman] + data[scan:],
        "too many codes": data[: huffman + 5] + b"\xff" * 16 + data[huffman + 21 :],
        "a code of ones alone": data[: huffman + 5] + b"\x02" + b"\0" * 15 + data[huffman + 21 :],
        "a table of a number that is not": data[: huffman + 4] + b"\x02" + data[huffman + 5 :],
        "no quantisation": data[:tables] + data[frame:],
        "a fifth quantisation table": data[: tables + 4] + b"\x04" + data[tables + 5 :],
        "a scan of one component": data[: scan + 2] + b"\0\x08\1\1\0" + data[body - 3 :],
    }


@pytest.mark.parametrize("spec", SPECS)
def test_pixels_are_within_two_levels_of_the_exact_ones(
    spec: Preprocess, photos: dict[str, Image.Image]
) -> None:
    exact, gpu = (create_transform(replace(spec, transform=name)) for name in ("exact", "gpu"))
    turned = [photo.transpose(Image.Transpose.ROTATE_90) for photo in photos.values()]
    slivers = [Image.new("RGB", size, "red") for size in ((1, 1), (1, 5000), (16000, 1), (7, 300))]
    for image in (*photos.values(), *turned, *slivers):
        difference = (exact(image).int() - gpu(image).int()).abs()
        assert difference.max() <= 2
        assert (difference > 0).float().mean() < 0.01


def test_files_of_all_orientations_become_what_the_cpu_makes_of_them(
    inputs: JpegInputs, photos: dict[str, Image.Image]
) -> None:
    files = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(encode(photos["coffee"], exif=exif, subsampling=orientation % 3))
    files.append(encode(photos["rocket"].convert("L"), exif=exif))
    batch = batch_of(inputs, *files)
    pixels = batch.to(CPU)
    assert not batch.refused
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    for data, row in zip(files, pixels, strict=True):
        image = decode_image(data)
        assert opened(inputs, data).size == image.size
        assert torch.equal(row, create_transform(SPEC)(image))


def test_baseline_files_wait_and_others_do_not(photos: dict[str, Image.Image]) -> None:
    photo = photos["coffee"].resize((60, 40))
    plain = encode(photo)
    stream = io.BytesIO()
    photo.save(stream, "MPO", save_all=True, append_images=[photo])
    profile = encode(photo, icc_profile=bytes(200_000), comment=b"a comment")
    rgb = encode(photo, keep_rgb=True)
    adobe = rgb.index(b"\xff\xee")
    unmarked = rgb[:adobe] + rgb[adobe + 16 :]  # known by the names of its components alone
    shape = (3, 224, 224)
    least = encode(Image.new("RGB", photo.size, "white"), optimize=True)  # two bits a block
    restarts = encode(photo, restart_marker_blocks=1)
    grey = encode(photo.convert("L"))
    for data in (plain, profile, grey, encode(photo, optimize=True), least, restarts):
        file = open_jpeg(data, DEFAULT_LIMITS, shape)
        assert file is not None
        assert (file.size, file.pixels, file.shape) == ((60, 40), 2400, shape)
    others = {
        "progressive": encode(photo, progressive=True),
        "CMYK": encode(photo.convert("CMYK")),
        "RGB": rgb,
        "RGB without a marker": unmarked,
        "several pictures": stream.getvalue(),
        "PNG": encode(photo, "PNG"),
        "WebP": encode(photo, "WEBP"),
        "cut off": plain[:-100],
        "no end": plain[:-2],
        "something behind it": plain + b"\0",
        "a second scan": plain[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0\xff\xd9",
        "nothing": b"",
        **doubtful_files(plain),
    }
    assert {
        name for name, data in others.items() if open_jpeg(data, DEFAULT_LIMITS, shape)
    } == set()


def test_limits_are_checked_before_a_file_waits(jpegs: dict[str, bytes]) -> None:
    data = jpegs["coffee"]
    for limits in (ImageLimits(max_bytes=1000), ImageLimits(max_side=500)):
        with pytest.raises(ImageTooLargeError):
            open_jpeg(data, limits, (3, 224, 224))
    with pytest.raises(InputError, match="not an image in a served format"):
        open_jpeg(data[:20] + data[-2:], DEFAULT_LIMITS, (3, 224, 224))


def test_metadata_is_cut_out_and_nothing_else(photos: dict[str, Image.Image]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = bytes(100_000)
    data = encode(photos["coffee"], exif=exif, icc_profile=profile, xmp=b"<x:xmpmeta/>")
    cut = without_metadata(data)
    image = Image.open(io.BytesIO(cut))
    assert not image.getexif()
    assert "xmp" not in image.info
    assert image.info["icc_profile"] == profile
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))
    assert without_metadata(cut) is cut


def test_a_damaged_file_does_not_fail_its_batch(
    inputs: JpegInputs, jpegs: dict[str, bytes]
) -> None:
    batch = batch_of(inputs, jpegs["coffee"], damaged(jpegs["rocket"]), jpegs["chelsea"])
    pixels = batch.to(CPU)
    assert batch.refused == [1]
    for row, name in ((0, "coffee"), (2, "chelsea")):
        assert torch.equal(pixels[row], create_transform(SPEC)(decode_image(jpegs[name])))
    assert batch_of(inputs, jpegs["coffee"]).refused == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: unknown error"),
        RuntimeError("Failed to decode batch: 5"),
    ],
)
def test_errors_of_the_device_are_not_the_files(
    error: Exception, inputs: JpegInputs, jpegs: dict[str, bytes]
) -> None:
    def decode(files: Sequence[bytes]) -> list[Tensor]:
        raise error

    inputs.decode = decode
    with pytest.raises(type(error), match=str(error)):
        batch_of(inputs, *jpegs.values()).to(CPU)


def test_pixels_of_another_size_than_the_files_are_refused(
    inputs: JpegInputs, jpegs: dict[str, bytes]
) -> None:
    decode = inputs.decode
    inputs.decode = lambda files: [pixels[:, 1:] for pixels in decode(files)]
    batch = batch_of(inputs, jpegs["coffee"])
    assert not batch.to(CPU).any()
    assert batch.refused == [0]


def test_large_files_are_left_to_the_cpu(
    inputs: JpegInputs, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = opened(inputs, jpegs["coffee"]).pixels
    monkeypatch.setattr(jpeg_batch, "MAX_FILE_PIXELS", pixels - 1)
    assert inputs.open(jpegs["coffee"], DEFAULT_LIMITS) is None


def test_pixels_that_are_decoded_together_are_bounded(
    inputs: JpegInputs, photos: dict[str, Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(100, 50), (50, 100), (300, 200), (10, 10), (90, 50), (80, 80)]
    files = [encode(photos["coffee"].resize(size)) for size in sizes]
    alone = [batch_of(inputs, data).to(CPU)[0] for data in files]
    decode, decoded = inputs.decode, []

    def counted(files: Sequence[bytes]) -> list[Tensor]:
        images = decode(files)
        decoded.append([image.shape[1] * image.shape[2] for image in images])
        return images

    inputs.decode = counted
    monkeypatch.setattr(jpeg_batch, "MAX_PIXELS", 10_000)
    pixels = batch_of(inputs, *files).to(CPU)
    assert decoded == [[5000, 5000], [60_000], [100, 4500], [6400]]
    assert torch.equal(pixels, torch.stack(alone))


def test_files_and_tensors_are_mixed_in_a_batch(
    inputs: JpegInputs, photos: dict[str, Image.Image], jpegs: dict[str, bytes]
) -> None:
    files = {number: opened(inputs, jpegs[name]) for number, name in ((0, "coffee"), (2, "rocket"))}
    transform = create_transform(SPEC)
    want = [transform(decode_image(jpegs["coffee"])), transform(photos["astronaut"])]
    want.append(transform(decode_image(jpegs["rocket"])))
    pixels = JpegBatch(inputs, files, {1: want[1]}).to(CPU)
    assert torch.equal(pixels, torch.stack(want))
    normalize = Normalize(SPEC)
    pixels = JpegBatch(inputs, files, {1: normalize(want[1])}).to(CPU)
    assert torch.equal(pixels, normalize(torch.stack(want)))


def test_a_batch_does_not_wait_for_the_device_beyond_its_decoder(
    inputs: JpegInputs, jpegs: dict[str, bytes]
) -> None:
    files = [opened(inputs, data) for data in jpegs.values()]
    inputs.decode = lambda data: [
        torch.empty(3, *reversed(file.stored_size), dtype=torch.uint8, device=GPU) for file in files
    ]
    with fake_gpu() as mode:
        rest = mode.from_tensor(torch.zeros(3, 224, 224, dtype=torch.uint8))
        mixed = JpegBatch(inputs, dict(enumerate(files)), {4: rest})
        with NoWaiting():
            pixels = mixed.to(GPU, non_blocking=True)
    assert (pixels.shape, pixels.device) == ((5, 3, 224, 224), GPU)


@pytest.mark.parametrize(
    ("spec", "size", "fits"),
    [
        (Preprocess(), (4000, 3000), True),
        (Preprocess(), (16_384, 3051), True),
        (Preprocess(crop_mode="squash"), (16_384, 3051), True),
        (Preprocess(crop_mode="squash", input_size=(64, 64)), (16_384, 3051), False),
        (Preprocess(crop_mode="squash", input_size=(64, 64)), (3051, 16_384), False),
        (Preprocess(input_size=(32, 32), interpolation="bilinear"), (7000, 7000), False),
    ],
)
def test_what_cudas_kernel_cannot_shrink_is_left_to_the_cpu(
    spec: Preprocess, size: tuple[int, int], fits: bool
) -> None:
    transform = create_transform(replace(spec, transform="gpu"))
    assert isinstance(transform, TensorTransform)
    assert transform.fits_gpu(*size) is fits


def test_a_file_that_the_gpu_cannot_resize_does_not_wait(
    inputs: JpegInputs, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorTransform, "fits_gpu", lambda self, width, height: width < 600)
    assert inputs.open(jpegs["astronaut"], DEFAULT_LIMITS)
    assert not inputs.open(jpegs["coffee"], DEFAULT_LIMITS)


def test_the_transform_has_a_digest_of_its_own() -> None:
    digests = {replace(SPEC, transform=name).digest for name in ("exact", "fast", "gpu")}
    assert len(digests) == 3


def test_cpus_refuse_the_transform(tiny_catalog: Path) -> None:
    refusal = "the gpu transform needs an NVIDIA GPU; the device is cpu"
    with pytest.raises(CatalogError, match=refusal):
        Registry.from_catalog(tiny_catalog, device="cpu", transform="gpu")
    path = tiny_catalog.parent / "on-gpu.toml"
    path.write_text(
        tiny_catalog.read_text().replace("[trunks.tiny]", '[trunks.tiny]\ntransform = "gpu"')
    )
    registry = Registry.from_catalog(path, device="cpu")
    with pytest.raises(CatalogError, match=refusal):
        registry.get("tiny")
    registry.get("conv")


def test_without_torchcodec_the_transform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.delitem(sys.modules, "torchcodec.decoders", raising=False)
    with pytest.raises(CatalogError, match=r"needs torchcodec: pip install 'vitrail\[gpu\]'"):
        nvjpeg.create_jpeg_decoder(GPU)


def test_crops_that_the_transform_does_not_have_are_refused() -> None:
    for spec in (Preprocess(crop_mode="letterbox"), Preprocess(interpolation="lanczos")):
        with pytest.raises(CatalogError, match="the gpu transform has no"):
            create_transform(replace(spec, transform="gpu"))
