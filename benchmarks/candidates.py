"""The servers that the comparison can start: Vitrail, and the rivals in `benchmarks/rivals`."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bodies import (
    Encoder,
    form,
    image_or_form,
    image_or_numbered_form,
    open_inference,
    plural_form,
)
from benchmarks.bundle import Setting
from benchmarks.rivals.environments import python_of
from benchmarks.rivals.options import Options
from benchmarks.servers import Server, StartError, free_port
from benchmarks.workload import Workload

ROOT = Path(__file__).parents[1]
VITRAIL = "vitrail"
# One thread for each worker, and glibc's allocator keeps freed memory, as Vitrail's does.
TUNING = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "2147483647",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """How a server is asked.

    Args:
        path: where images are classified; `{model}` stands for the model's name.
        ready: the path that answers 200 once the model is loaded.
        encode: how images travel.
    """

    path: str
    ready: str
    encode: Encoder


CANDIDATES: Mapping[str, Candidate] = {
    VITRAIL: Candidate("/classify?model={model}", "/readyz", image_or_form),
    "plain_fastapi": Candidate("/predict", "/ready", image_or_form),
    "litserve": Candidate("/predict", "/health", form),
    "bentoml": Candidate("/predict", "/readyz", plural_form),
    "ray_serve": Candidate("/", "/", image_or_form),
    "torchserve": Candidate("/predictions/classifier", "/ping", image_or_numbered_form),
    "mlserver": Candidate(
        "/v2/models/classifier/infer", "/v2/models/classifier/ready", open_inference
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """Starts candidates for one comparison.

    Args:
        rivals: the folder of the rivals' environments.
        logs: a folder for the servers' output and working files.
        rival_batch: the most images in a rival's batch.
        device: `cpu` or `cuda`.
        engine: Vitrail's.
        environment: Vitrail's further settings.
    """

    workload: Workload
    setting: Setting
    rivals: Path
    logs: Path
    rival_batch: int
    device: str = "cpu"
    engine: str = "auto"
    environment: Mapping[str, str] = field(default_factory=dict)

    def server(self, name: str, model: str) -> Server:
        """A server of the model, which is started by entering it.

        Raises:
            StartError: a rival that is not installed.
        """
        port = free_port()
        folder = self.logs / f"{name}-{model}"  # some servers write into their working folder
        folder.mkdir(parents=True, exist_ok=True)
        if name == VITRAIL:
            command, environment = self._vitrail(model, port), dict(self.environment)
        else:
            python = python_of(name, self.rivals)
            if not python.exists():
                raise StartError(
                    f"{python} does not exist; run `python -m benchmarks.rivals install {name}`"
                )
            command = [str(python), "-m", f"benchmarks.rivals.{name}"]
            environment = TUNING | self._options(model, port, folder).environment()
        return Server(
            command,
            port,
            ready=CANDIDATES[name].ready,
            environment={"PYTHONPATH": str(ROOT), **environment},
            folder=folder,
            log=folder / "output.log",
        )

    def _vitrail(self, model: str, port: int) -> list[str]:
        return [
            sys.executable, "-m", "service.cli", "serve", "--models", model,
            "--catalog", str(self.workload.catalog),
            "--port", str(port), "--grpc-port", str(free_port()),
            "--transform", self.setting.transform, "--precision", self.setting.precision,
            "--device", self.device, "--engine", self.engine,
        ]  # fmt: skip

    def _options(self, model: str, port: int, folder: Path) -> Options:
        return Options(
            architecture=model,
            weights=self.workload.weights(model),
            port=port,
            folder=folder,
            workers=len(os.sched_getaffinity(0)),
            max_batch=self.rival_batch,
            images=self.setting.images,
            device=self.device,
            precision="float32" if self.device == "cpu" else self.setting.precision,
        )
