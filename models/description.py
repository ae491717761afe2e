"""A model's description: the object that `GET /models/{name}` returns.

Needs no torch, so that a gateway can read descriptions that its workers send.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self


class State(StrEnum):
    """Where a model is in its life."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


# Members that are null in JSON where they have no value. All others are absent.
_NULLABLE = frozenset({"text_trunk", "reason"})
_NULLABLE_ONCE_LOADED = _NULLABLE | {"head"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model of the catalog, or a head that is served as one.

    Members that are None by default are known once the model is loaded, and absent from the JSON
    before. The exceptions are in the comments.
    """

    name: str
    # The model's own task, which it does when a request names none.
    task: str
    # All tasks that it does. Before loading: those known from the catalog.
    tasks: tuple[str, ...]
    # The tasks for which it is the default, when a request names no model.
    default_for: tuple[str, ...]
    trunk: str
    # The trunk that reads texts, if it is another one. Null rather than absent.
    text_trunk: str | None = None
    # A `State`, or one that only a newer worker has.
    state: str
    # Why the model does not answer. Null rather than absent.
    reason: str | None = None
    # Where the trunk's weights come from.
    source: str
    device: str
    dtype: str
    licence: str
    description: str
    # The name of the checkpoint format.
    format: str | None = None
    architecture: str | None = None
    # What runs the trunk's passes, the precision it computes in, and the kind of image transform.
    engine: str | None = None
    precision: str | None = None
    transform: str | None = None
    # Of an engine other than eager, compared with eager float32: `largest_error` over the largest
    # value, `top1_agreement` of the classifier or `cosine`, on how many `inputs`.
    agreement: Mapping[str, Any] | None = None
    # Why the engine is not another one.
    engine_reason: str | None = None
    # The weights of trunk, head and the engine's passes, and of the head alone.
    memory_bytes: int | None = None
    head_bytes: int | None = None
    # How a head from a file was made: `kind`, `trunk_digest`, `training`. Null for other heads.
    head: Mapping[str, Any] | None = None
    # The trunk's transform. Its members depend on the modality.
    preprocess: Mapping[str, Any] | None = None
    # The number of classes; 0 for models without.
    labels: int | None = None
    # These change when the outputs or the preprocessing do.
    model_digest: str | None = None
    preprocess_digest: str | None = None
    # The kinds of input: `image`, `text`, `video`, `latent`.
    modalities: tuple[str, ...] | None = None
    # The duration of loading, warm-up included.
    load_seconds: float | None = None
    # Why it is not as a newer catalog says: that did not load, so what was before is served.
    update_error: str | None = None
    # Whether a server loads it at start. Known to servers, not to the library.
    startup: bool | None = None
    # Whether a request loads it where it is not loaded. Known to servers, and absent if not.
    on_demand: bool | None = None
    # Members that only a newer worker knows. `to_json` returns them unchanged.
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory, so that every member is known."""
        return self.model_digest is not None

    @property
    def is_ready(self) -> bool:
        """Whether the model answers now. A ready model with a reason fails its probe."""
        return self.state == State.READY and not self.reason

    def to_json(self) -> dict[str, Any]:
        """The members of the JSON object, without those that have no value."""
        nullable = _NULLABLE_ONCE_LOADED if self.is_loaded else _NULLABLE
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name in _MEMBERS
            if (value := getattr(self, name)) is not None or name in nullable
        } | dict(self.others)

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> Self:
        """The description that `to_json` returned, here or in another process.

        Raises:
            TypeError: a member is missing that every description has.
        """
        known: dict[str, Any] = {
            name: tuple(value) if name in _SEQUENCES and value is not None else value
            for name, value in members.items()
            if name in _MEMBERS
        }
        others = {name: value for name, value in members.items() if name not in _MEMBERS}
        return cls(**known, others=others)


_MEMBERS = tuple(item.name for item in fields(ModelDescription) if item.name != "others")
_SEQUENCES = frozenset({"tasks", "default_for", "modalities"})


@dataclass(frozen=True, slots=True, kw_only=True)
class UnservedHead:
    """A head that is not a model yet, or cannot become one.

    It waits for its fit, is being fitted, or its fit or file failed.
    """

    name: str
    # `queued`, `fitting` or `failed`.
    state: str
    reason: str | None = None
    # Of a fit: `stage`, `done`, `total` and `accuracy`.
    progress: Mapping[str, Any] | None = None
    # Unknown if the head's file is unreadable.
    trunk: str | None = None
    task: str | None = None

    @property
    def is_ready(self) -> bool:
        """False: the head is not served."""
        return False

    def to_json(self) -> dict[str, Any]:
        """The members of the JSON object; all but the reason are absent if unknown."""
        members = {item.name: getattr(self, item.name) for item in fields(self)}
        return {k: v for k, v in members.items() if v is not None or k == "reason"}


HeadDescription = ModelDescription | UnservedHead


def head_from_json(members: Mapping[str, Any]) -> HeadDescription:
    """A head's description from JSON, whether it is served or not.

    Raises:
        TypeError: a member is missing that every description has.
    """
    if "tasks" in members:
        return ModelDescription.from_json(members)
    known = {item.name for item in fields(UnservedHead)}
    return UnservedHead(**{k: v for k, v in members.items() if k in known})
