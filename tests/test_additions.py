"""A task, a head, a checkpoint format and an engine are one new file each, served everywhere.

Each file is dropped into a copy of the packages. Nothing else in the copy changes.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from safetensors.torch import load_file, save_file

from service.rpc.wire import from_tensor
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from tests.conftest import answers, free_port, wait_until
from tests.test_architecture import ROOT

FILES = {
    "models/tasks/brightness.py": '''
"""Brightness: a number for each image."""

from pydantic import Field

from models.tasks.base import Options, Output, Task


class BrightnessOptions(Options):
    gain: float = Field(1.0, ge=0, le=10, description="Factor of the brightness.")


TASK = Task(
    name="brightness",
    summary="Measure how bright images are.",
    options=BrightnessOptions,
    outputs=(Output("brightness", "FP32", (-1,)),),
    render=lambda arrays: {"brightness": float(arrays["brightness"])},
    line=lambda entry: f"{entry['brightness']:.6f}",
)
''',
    # a head for the new task; the test of heads alone has one for an old task
    "models/heads/magnitude.py": '''
"""The mean magnitude of a trunk's features, times a gain."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from torch import Tensor

from models.heads.base import Head
from models.trunks.base import Trunk
from models.trunks.output import TrunkOutput


class Magnitude(Head):
    kind = "magnitude"
    task = "brightness"

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: Any) -> Self:
        return cls()

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        return {"mean": output.tokens_BTD.abs().mean((1, 2))}

    def finish(
        self, row: Mapping[str, np.ndarray], size: tuple[int, int], *, gain: float = 1.0
    ) -> dict[str, np.ndarray]:
        return {"brightness": np.float32(row["mean"]) * np.float32(gain)}
''',
    "models/heads/halves.py": '''
"""Two classes: whether the first half of the features outweighs the second."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from models.heads.ranking import Ranking
from models.trunks.base import Trunk
from models.trunks.output import TrunkOutput


class Halves(Ranking):
    kind = "halves"

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: Any) -> Self:
        head = cls(["first", "second"])
        head.trunk = trunk
        return head

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        pooled = self.trunk.pool(output)
        first, second = pooled.chunk(2, 1)
        return {"logits": torch.stack([first.sum(1), second.sum(1)], 1)}
''',
    "models/checkpoints/formats/upside_down.py": '''
"""Checkpoints whose keys are timm's, spelt backwards."""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container

NAME = "upside-down"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    return "keys spelt backwards" if "nekot_slc" in container.tensors else None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    state_dict = {key[::-1]: value for key, value in container.tensors.items()}
    return Checkpoint(format=NAME, architecture="test_vit", state_dict=state_dict)
''',
    "models/trunks/engines/negative.py": '''
"""Runs a pass eagerly and changes the sign of every output."""

from torch import Tensor, nn

from models.trunks.engines.base import Engine, Pass, PassKey


class Negative(Engine):
    name = "negative"

    def build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        return lambda *tensors: {name: -tensor for name, tensor in module(*tensors).items()}
''',
}

CATALOG = """
[trunks.tiny]
source = "file:tiny.safetensors"
architecture = "test_vit"

[trunks.backwards]
source = "file:backwards.safetensors"

[trunks.negative]
source = "file:tiny.safetensors"
architecture = "test_vit"
engine = "negative"

[models.plain]
trunk = "tiny"
task = "embed"

[models.bright]
trunk = "tiny"
task = "brightness"

[models.halved]
trunk = "tiny"
task = "classify"
head = "halves"

[models.backwards]
trunk = "backwards"
task = "embed"

[models.negative]
trunk = "negative"
task = "embed"
"""


@dataclass(frozen=True)
class Served:
    """A server of the copied packages, and clients of it."""

    folder: Path
    url: str
    stub: Any
    photo: Path

    @property
    def image(self) -> bytes:
        return self.photo.read_bytes()

    def rest(self, task: str, model: str, **options: Any) -> dict[str, Any]:
        answer = httpx.post(
            f"{self.url}/{task}", content=self.image, params={"model": model, **options}
        )
        assert answer.status_code == 200, answer.text
        entry: dict[str, Any] = answer.json()["results"][0]
        return entry

    def infer(self, task: str, model: str, **options: Any) -> dict[str, np.ndarray]:
        """By gRPC's `Infer`."""
        struct = Struct()
        struct.update(options)
        request = pb.InferRequest(
            task=task, model=model, inputs=pb.Inputs(images=[self.image]), options=struct
        )
        [result] = self.stub.Infer(request).results
        assert not result.HasField("error"), MessageToDict(result.error)
        return {tensor.name: from_tensor(tensor) for tensor in result.tensors}

    def v2(self, model: str, output: str) -> Any:
        """An output of one image by the Open Inference Protocol."""
        answer = httpx.post(
            f"{self.url}/v2/models/{model}/infer",
            content=self.image,
            headers={"Inference-Header-Content-Length": "0"},
        )
        assert answer.status_code == 200, answer.text
        [data] = [item["data"] for item in answer.json()["outputs"] if item["name"] == output]
        return data

    def command(self, task: str, model: str, *flags: str) -> str:
        """What `vitrail TASK` prints."""
        return self.run("-m", "service.cli", task, str(self.photo), "--url", self.url,
                        "--model", model, *flags)  # fmt: skip

    def run(self, *arguments: str) -> str:
        done = python(self.folder, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages of that folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "120"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, text=True,
                          capture_output=True, timeout=120, check=False)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_catalog: Path) -> Path:
    """A copy of the packages with the new files, a catalog and its checkpoints."""
    folder = tmp_path_factory.mktemp("additions")
    for package in ("models", "service"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    for name, content in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(content)
    tensors = load_file(tiny_catalog.parent / "tiny.safetensors")
    save_file(tensors, folder / "tiny.safetensors")
    save_file(
        {key[::-1]: value for key, value in tensors.items()}, folder / "backwards.safetensors"
    )
    (folder / "catalog.toml").write_text(CATALOG)
    return folder


# what the library answers; one process, because each imports torch for seconds
LIBRARY = """
import json, sys
from models import Registry

registry = Registry.from_catalog("catalog.toml", device="cpu")
print(json.dumps({
    "bright": registry.get("bright").predict(sys.argv[1:], gain=2)[0],
    "halved": registry.get("halved").predict(sys.argv[1:])[0],
    "backwards": registry.get("backwards").predict(sys.argv[1:], pooling="mean")[0],
    "negative": registry.get("negative").predict(sys.argv[1:], pooling="mean")[0],
    "engine": Registry.from_catalog(
        "catalog.toml", device="cpu", engine="negative"
    ).get("plain").trunk.engine.name,
}))
"""


@pytest.fixture(scope="module")
def library(served: Served) -> dict[str, Any]:
    """Entries of the photo by model, and the engine of a registry with an engine for all."""
    answers: dict[str, Any] = json.loads(served.run("-c", LIBRARY, str(served.photo)))
    return answers


@pytest.fixture(scope="module")
def served(folder: Path, jpegs: dict[str, bytes]) -> Iterator[Served]:
    photo = folder / "coffee.jpg"
    photo.write_bytes(jpegs["coffee"])
    port, grpc_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port), "--grpc-port",
               str(grpc_port), "--catalog", "catalog.toml", "--device", "cpu",
               "--log-level", "warning"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with (
        subprocess.Popen(command, cwd=folder, env=environment) as started,
        grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
    ):
        try:
            wait_until(lambda: answers(f"{url}/readyz") or started.poll() is not None, 120)
            assert started.poll() is None, "the server ended"
            yield Served(folder, url, VisionStub(channel), photo)
        finally:
            started.kill()


def test_a_new_task_has_a_command_with_its_options(folder: Path) -> None:
    overview = python(folder, "-m", "service.cli", "--help")
    assert "Measure how bright images are." in overview.stdout, overview.stderr
    own = python(folder, "-m", "service.cli", "brightness", "--help").stdout
    assert "--gain" in own
    assert "0<=x<=10" in own
    assert "Factor of the brightness." in own
    refused = python(folder, "-m", "service.cli", "brightness", "tiny.safetensors", "--gain", "11")
    assert refused.returncode == 2
    assert "--gain" in refused.stderr


def test_a_new_task_has_a_route_that_openapi_describes(served: Served) -> None:
    document = httpx.get(f"{served.url}/openapi.json").json()
    described = document["paths"]["/brightness"]["post"]
    assert described["operationId"] == "brightness_brightness_post"
    assert described["description"].startswith("Measure how bright images are.")
    [gain] = [item["schema"] for item in described["parameters"] if item["name"] == "gain"]
    assert (gain["type"], gain["minimum"], gain["maximum"]) == ("number", 0, 10)
    wrong = httpx.post(f"{served.url}/brightness?model=bright&gain=11", content=served.image)
    assert wrong.status_code == 422
    assert [error["field"] for error in wrong.json()["errors"]] == ["gain"]
    other = httpx.post(f"{served.url}/brightness?model=plain", content=served.image)
    assert other.status_code == 422
    assert "does not do 'brightness'" in other.json()["detail"]


def test_a_new_task_is_served_everywhere(served: Served, library: dict[str, Any]) -> None:
    value = served.rest("brightness", "bright")["brightness"]
    assert value > 0
    double = pytest.approx(2 * value, rel=1e-5)
    assert served.rest("brightness", "bright", gain=2)["brightness"] == double
    assert served.infer("brightness", "bright", gain=2)["brightness"] == double
    assert library["bright"]["brightness"] == double
    assert served.v2("bright", "brightness") == [pytest.approx(value, rel=1e-5)]
    metadata = httpx.get(f"{served.url}/v2/models/bright").json()
    assert {"name": "brightness", "datatype": "FP32", "shape": [-1]} in metadata["outputs"]
    printed = served.command("brightness", "bright", "--gain", "2")
    assert printed == f"{served.photo}: {2 * value:.6f}\n"
    default = httpx.post(
        f"{served.url}/brightness", content=served.image, headers={"Accept": "application/x-ndjson"}
    )
    assert json.loads(default.text)["brightness"] == pytest.approx(value, rel=1e-5)


def test_a_new_head_is_served_everywhere(served: Served, library: dict[str, Any]) -> None:
    entry = served.rest("classify", "halved")
    scores = {item["label"]: item["score"] for item in entry["predictions"]}
    assert scores.keys() == {"first", "second"}
    assert sum(scores.values()) == pytest.approx(1)
    tensors = served.infer("classify", "halved", top_k=1)
    [best] = tensors["label"].tolist()
    assert scores[best] == pytest.approx(float(tensors["score"][0]), rel=1e-5)
    assert served.v2("halved", "label")[0] == best
    assert library["halved"]["predictions"][0]["label"] == best
    assert served.command("classify", "halved", "--top-k", "1").startswith(
        f"{served.photo}: {best}"
    )


@pytest.mark.parametrize(("model", "sign"), [("backwards", 1), ("negative", -1)])
def test_new_formats_and_engines_are_served_everywhere(
    served: Served, library: dict[str, Any], model: str, sign: int
) -> None:
    """The format's weights are the plain ones; the engine changes the sign of all features."""
    plain = sign * np.array(served.rest("embed", "plain", pooling="mean")["embedding"])
    for name, vector in {
        "REST": served.rest("embed", model, pooling="mean")["embedding"],
        "gRPC": served.infer("embed", model, pooling="mean")["embedding"],
        "library": library[model]["embedding"],
    }.items():
        np.testing.assert_allclose(vector, plain, atol=1e-5, err_msg=name)
    assert len(served.v2(model, "embedding")) == len(plain)
    assert f"{len(plain)} dimensions" in served.command("embed", model)
    described = httpx.get(f"{served.url}/models/{model}").json()
    assert (described["format"], described["engine"]) == (
        ("upside-down", "eager") if model == "backwards" else ("timm", "negative")
    )


def test_a_checkpoint_of_a_new_format_is_inspected(served: Served) -> None:
    inspected = served.run("-m", "service.cli", "models", "inspect", "backwards.safetensors")
    assert "upside-down" in inspected


def test_an_engine_can_be_set_for_all_trunks(served: Served, library: dict[str, Any]) -> None:
    assert library["engine"] == "negative"
    refused = python(
        served.folder, "-m", "service.cli", "serve", "--catalog", "catalog.toml", "--engine", "x"
    )
    assert refused.returncode == 2
    assert "unknown engine 'x'" in refused.stderr
