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
    state: State = State.UNLOADED
    # Why loading failed.
    reason: str = ""
    model: Model | None = None
    # The name of the checkpoint format.
    format: str = ""
    load_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def uses(self, trunk: str) -> bool:
        """Whether the trunk of that name must stay loaded for this model."""
        in_use = self.model is not None or self.state is State.LOADING
        return in_use and trunk in self.entry.trunks
