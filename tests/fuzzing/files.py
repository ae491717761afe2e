"""Hostile clips, archives, heads, adapters and checkpoints."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import av
import numpy as np
import onnx
import torch
from PIL import Image
from safetensors.torch import save

from models.heads.files import METADATA_KEY
from tests.fuzzing.mutations import NUMBERS, mutate, mutate_value, to_json

# -- clips ---------------------------------------------------------------------------------


@cache
def _clips() -> tuple[bytes, ...]:
    kinds = (("mp4", "mpeg4"), ("webm", "libvpx"), ("matroska", "mjpeg"))
    clips = [_clip(container, codec, count) for container, codec in kinds for count in (1, 12)]
    return (*clips, _gif())


def _clip(container: str, codec: str, count: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=10)
        stream.width, stream.height = 32, 24
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(count):
            pixels = np.full((24, 32, 3), 20 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            output.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        output.mux(stream.encode())
    return buffer.getvalue()


def _gif() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("L", (32, 24), 20 * number) for number in range(6)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def hostile_clip(number: int) -> bytes:
    """The clip of that number: MP4, WebM or GIF, damaged, or with sizes in its boxes that lie."""
    random = Random(number)
    data = random.choice(_clips())
    boxes = [place for name in (b"stsz", b"stts", b"stco", b"tkhd", b"stsd", b"mvhd")
             if (place := data.find(name)) > 0]  # fmt: skip
    if boxes and random.random() < 0.4:
        place = random.choice(boxes) + random.choice((-4, 8, 12, 16, 20))
        number = random.choice(NUMBERS) % 2**32
        return data[:place] + struct.pack(">I", number) + data[place + 4 :]
    return mutate(random, data)


# -- archives ------------------------------------------------------------------------------

NAMES = (
    "a/1.jpg", "a/2.png", "b/1.jpg", "root/c/1.jpg", "../../x/1.jpg", "/a/1.jpg", "a\\1.jpg",
    "a/", "1.jpg", "a/b/c/d/1.jpg", "__MACOSX/a/1.jpg", "a/.jpg", "\u202e/1.jpg", "a/1.jpg\0x",
    "a" * 300 + "/1.jpg", "CON/1.jpg",
)  # fmt: skip
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def hostile_archive(number: int) -> bytes:
    """The zip archive of that number."""
    random = Random(number)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # that a name comes twice is meant
        for name in random.choices(NAMES, k=random.choice((0, 1, 4, 12))):
            content = random.randbytes(random.choice((0, 10, 500)))
            if random.random() < 0.05:
                content = bytes(300_000)
            archive.writestr(zipfile.ZipInfo(name), content, random.choice(METHODS))
    data = buffer.getvalue()
    entry = data.rfind(b"PK\x01\x02")
    if entry >= 0 and random.random() < 0.5:  # flags, method, CRC, sizes, number, place
        place, width = random.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)))
        value = struct.pack("<Q", random.choice(NUMBERS) % 2**32)[:width]
        data = data[: entry + place] + value + data[entry + place + width :]
    return data if random.random() < 0.3 else mutate(random, data)


# -- heads ---------------------------------------------------------------------------------

METADATA = {
    "version": 1, "kind": "linear", "task": "classify", "trunk": "tiny",
    "trunk_digest": "sha256:0", "preprocess_digest": "sha256:0", "trunk_source": "",
    "labels": ["a", "b"], "settings": {"pool": "token"}, "training": {"accuracy": 0.5},
}  # fmt: skip


def hostile_head(number: int) -> bytes:
    """The head's file of that number: its header, its metadata or its bytes are wrong."""
    random = Random(number)
    tensors = {"weight": torch.ones(2, 64), "bias": torch.zeros(2)}
    metadata: Any = METADATA
    for _ in range(random.randrange(3)):
        metadata = mutate_value(random, metadata)
    text = to_json(metadata).decode()
    if random.random() < 0.1:
        text = random.choice(("[" * 100_000, "1" * 5000, "\ud800", "{", "null"))
    data = save(tensors, {METADATA_KEY: text.encode("utf-8", "replace").decode()})
    return _hostile_safetensors(random, data)


def _hostile_safetensors(random: Random, data: bytes) -> bytes:
    match random.randrange(4):
        case 0:
            return data
        case 1:
            return mutate(random, data)
    size = int.from_bytes(data[:8], "little")
    header = to_json(mutate_value(random, json.loads(data[8 : 8 + size])))
    length = len(header) if random.random() < 0.8 else random.choice(NUMBERS) % 2**64
    return struct.pack("<Q", length) + header + data[8 + size :]


ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["qkv"], "bias": "none",
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
}  # fmt: skip


def hostile_adapter(number: int) -> bytes:
    """The archive of a LoRA adapter's two files of that number."""
    random = Random(number)
    name = "base_model.model.blocks.0.attn.qkv.lora_"
    tensors = {f"{name}A.weight": torch.ones(4, 64), f"{name}B.weight": torch.ones(192, 4)}
    config = ADAPTER if random.random() < 0.3 else mutate_value(random, ADAPTER)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter_config.json", to_json(config))
        weights = _hostile_safetensors(random, save(tensors))
        archive.writestr("adapter_model.safetensors", weights)
    return buffer.getvalue() if random.random() < 0.7 else mutate(random, buffer.getvalue())


# -- checkpoints ---------------------------------------------------------------------------


class _Code:
    """Runs code where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@cache
def _checkpoints() -> tuple[tuple[str, bytes], ...]:
    tensors = {"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(3)}
    files: list[tuple[str, bytes]] = [(".safetensors", save(tensors, {"format": "pt"}))]
    for content in (tensors, {"model": tensors, "args": {"lr": 1}, "epoch": 3}):
        for is_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
            files.append((".pth", buffer.getvalue()))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    savers: tuple[Any, ...] = (np.savez, np.savez_compressed)
    for save_arrays in savers:
        buffer = io.BytesIO()
        save_arrays(buffer, **arrays)
        files.append((".npz", buffer.getvalue()))
    buffer = io.BytesIO()
    np.savez(buffer, texts=np.array(["a", "b"]), objects=np.array([{}, None], object))
    files.append((".npz", buffer.getvalue()))
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([], "graph", [], [], initializers)
    files.append((".onnx", onnx.helper.make_model(graph).SerializeToString()))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still found in published files
        torch.jit.save(torch.jit.script(torch.nn.Linear(4, 3)), buffer)
    files.append((".pt", buffer.getvalue()))
    for code in (_Code(print, "code ran"), {"a": _Code(eval, "print('code ran')")}):
        files.append((".pth", pickle.dumps(code)))
    return tuple(files)


def hostile_checkpoint(number: int) -> tuple[str, bytes]:
    """The suffix and the content of the checkpoint of that number."""
    random = Random(number)
    suffix, data = random.choice(_checkpoints())
    if suffix == ".safetensors":
        return suffix, _hostile_safetensors(random, data)
    if random.random() < 0.1:
        return suffix, data
    if zipfile.is_zipfile(io.BytesIO(data)) and random.random() < 0.6:
        return suffix, _with_hostile_member(random, data)
    return suffix, mutate(random, data)


def _with_hostile_member(random: Random, data: bytes) -> bytes:
    """An archive that is whole, with a member that is not."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as archive:
        chosen = random.choice(source.namelist())
        for name in source.namelist():
            content = source.read(name)
            archive.writestr(name, mutate(random, content) if name == chosen else content)
    return buffer.getvalue()
