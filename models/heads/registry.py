"""Heads by kind. A head is found by being a class with a `kind` in this package."""

from collections.abc import Mapping, Sequence

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.strict import UNFIT
from models.discovery import classes_of
from models.errors import CatalogError, CheckpointError
from models.heads.base import Head
from models.trunks.base import Trunk


def head_classes() -> Mapping[str, type[Head]]:
    """Every head's class by its `kind`."""
    return classes_of("models.heads", "kind")


def head_class(kind: str) -> type[Head]:
    """The head of that kind.

    Raises:
        CatalogError: no such head.
    """
    if kind not in head_classes():
        raise CatalogError(f"no head {kind!r}; heads: {', '.join(head_classes())}")
    return head_classes()[kind]


def create_head(
    kind: str, trunk: Trunk, labels: Sequence[str], state: HeadState | None = None
) -> Head:
    """Create a head by its kind, with its weights if it has any.

    Raises:
        CatalogError: no such head, or the trunk lacks what it needs.
        CheckpointError: the weights do not fit the trunk.
    """
    head = head_class(kind)
    if state is None and head.needs_state:
        raise CatalogError(f"the head {kind} needs a file that holds its weights")
    try:
        return head.create(trunk, labels, state)
    except UNFIT as error:
        raise CheckpointError(
            f"the head {kind} does not fit the checkpoint: {type(error).__name__}: {error}"
        ) from error


def head_state(kind: str, states: Mapping[str, HeadState]) -> HeadState | None:
    """The weights for a head of that kind among those of a checkpoint."""
    return states.get(head_class(kind).state_name or kind)


def main_kind(trunk: Trunk, states: Mapping[str, HeadState]) -> str:
    """What a checkpoint is for: the kind of the head whose weights it brings, or else the one that
    its trunk allows.

    Raises:
        CheckpointError: it brings weights of several such heads.
    """
    brought = [
        kind
        for kind, head in head_classes().items()
        if head.is_main and head_state(kind, states) is not None
    ]
    if len(brought) > 1:
        raise CheckpointError(f"the checkpoint has several heads: {', '.join(brought)}")
    if brought:
        return brought[0]
    if trunk.modality == "latent":
        return "generate"
    return "classify" if trunk.num_classes else "embed"


def heads_of(trunk: Trunk, own: Head, states: Mapping[str, HeadState]) -> dict[str, Head]:
    """All heads of a model by task: its own, those that it brings, and those that every model on
    such a trunk has."""
    heads = {**own.companions(), own.task: own}
    for kind, head in head_classes().items():
        if head.task not in heads and head.comes_with(trunk, states):
            heads[head.task] = create_head(kind, trunk, (), head_state(kind, states))
    order = sorted(heads, key=lambda task: (task != "embed", task != own.task))
    return {task: heads[task] for task in order}
