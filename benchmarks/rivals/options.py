"""What the comparison passes to a rival, in environment variables."""

import os
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A rival's settings.

    Args:
        architecture: the name of the network in timm.
        weights: a safetensors file with the network's state.
        folder: a folder for files that the server needs while it runs.
        workers: processes that hold a model, with one thread each.
        max_batch: images in a forward pass.
        wait_ms: how long a batch waits for further requests.
        images: images in a request.
        device: `cpu` or `cuda`.
        precision: a dtype of torch's.
    """

    architecture: str
    weights: Path
    port: int
    folder: Path
    workers: int
    max_batch: int = 4
    wait_ms: int = 5
    images: int = 1
    device: str = "cpu"
    precision: str = "float32"

    @property
    def max_requests(self) -> int:
        """The requests in a batch."""
        return max(1, self.max_batch // self.images)

    def environment(self) -> dict[str, str]:
        """The variables that `from_environment` reads."""
        return {_variable(field.name): str(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_environment(cls) -> "Options":
        """The options that the comparison has set."""
        values = {field.name: os.environ[_variable(field.name)] for field in fields(cls)}
        return cls(
            architecture=values["architecture"],
            weights=Path(values["weights"]),
            port=int(values["port"]),
            folder=Path(values["folder"]),
            workers=int(values["workers"]),
            max_batch=int(values["max_batch"]),
            wait_ms=int(values["wait_ms"]),
            images=int(values["images"]),
            device=values["device"],
            precision=values["precision"],
        )


def _variable(name: str) -> str:
    return f"RIVAL_{name.upper()}"
