"""Vitrail's library: published vision checkpoints in, exact outputs out, no server needed.

    from models import Registry
    Registry.from_catalog("demo").get("efficientnet-lite0").predict(["cat.jpg"], top_k=3)

The public names are imported on first use: the gateway imports `models.tasks`, and no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.assembly import load_checkpoint
    from models.model import Model
    from models.registry import Registry

__all__ = ["Model", "Registry", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    match name:
        case "Registry":
            from models.registry import Registry

            return Registry
        case "Model":
            from models.model import Model

            return Model
        case "load_checkpoint":
            from models.assembly import load_checkpoint

            return load_checkpoint
    raise AttributeError(f"module 'models' has no attribute {name!r}")
