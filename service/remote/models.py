"""The models of one worker, kept up to date by what it says has changed."""

from collections import Counter
from collections.abc import Sequence

from models.description import ModelDescription


class WorkerModels:
    """Models by name, with what requests ask for, so that no request looks at all of them.

    Attributes:
        by_name: the models.
        startup: the names of those that the worker loads at start.
        defaults: for each task the model that does it by default.
        trunks: the number of ready models on each trunk.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, ModelDescription] = {}
        self.startup: dict[str, None] = {}
        self.defaults: dict[str, str] = {}
        self.trunks: Counter[str] = Counter()

    def apply(self, models: Sequence[ModelDescription], removed: Sequence[str]) -> set[str]:
        """Add or replace models, and remove others. Returns the names of all of them."""
        for model in models:
            self._forget(model.name)
        for name in removed:
            self._forget(name)
            self.by_name.pop(name, None)
        for model in models:
            self.by_name[model.name] = model
            self.defaults |= dict.fromkeys(model.default_for, model.name)
            if model.startup:
                self.startup[model.name] = None
            if model.is_ready:
                self.trunks.update(trunks_of(model))
        return {*(model.name for model in models), *removed}

    def differences(self, other: "WorkerModels") -> set[str]:
        """The names of models that only one of both has, or that differ."""
        names = self.by_name.keys() | other.by_name.keys()
        return {name for name in names if self.by_name.get(name) != other.by_name.get(name)}

    def _forget(self, name: str) -> None:
        """Forget what is known of a model, but its place among the others."""
        if (model := self.by_name.get(name)) is None:
            return
        for task in model.default_for:
            if self.defaults.get(task) == name:
                del self.defaults[task]
        self.startup.pop(name, None)
        if model.is_ready:
            for trunk in trunks_of(model):
                self.trunks[trunk] -= 1
                if not self.trunks[trunk]:
                    del self.trunks[trunk]


def trunks_of(model: ModelDescription) -> frozenset[str]:
    """The trunks that a model uses."""
    return frozenset(filter(None, (model.trunk, model.text_trunk)))
