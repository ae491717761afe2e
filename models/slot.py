"""A place in the registry: a catalog's model, whether it is loaded or not."""

import threading
from dataclasses import dataclass, field

from models.catalog import ModelEntry
from models.description import State
from models.model import Model


@dataclass(slots=True)
class Slot:
    """A catalog's model with its state. `lock` is held while it is loaded or unloaded."""

    entry: ModelEntry
    # Its place in the catalog's order.
    position: int
    state: State = State.UNLOADED
    # Why loading failed.
    reason: str = ""
    model: Model | None = None
    # The name of the checkpoint format.
    format: str = ""
    load_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def does(self, task: str) -> bool:
        """Whether the model is loaded and does the task."""
        model = self.model
        return model is not None and task in model.heads
