"""Which worker's description of a model a gateway shows, if workers differ."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from models.description import HeadDescription, ModelDescription
from service.remote.worker import Worker

# The states of models and heads, the closest to answering first.
STATES = ("ready", "loading", "fitting", "queued", "failed", "unloaded")

# Models that are named of each worker.
SHOWN = 5


def best_description(
    name: str, workers: Iterable[Worker], serving: Iterable[Worker]
) -> ModelDescription | None:
    """A model's description by the worker where it is closest to answering, with the change of it
    that failed on any worker; None if unknown.

    Args:
        serving: the workers that answer, whose descriptions are preferred.
    """
    models = [worker.models[name] for worker in workers if name in worker.models]
    answering = [worker.models[name] for worker in serving if worker.has_ready(name)]
    best = min(answering or models, key=closeness, default=None)
    error = next((model.update_error for model in models if model.update_error), None)
    return best if best is None or error is None else replace(best, update_error=error)


def closeness(model: HeadDescription) -> tuple[bool, int]:
    """A sort key, lowest for models that answer, highest for states of newer workers."""
    known = model.state in STATES
    return not model.is_ready, STATES.index(model.state) if known else len(STATES)


def differences(models: Sequence[str]) -> list[str]:
    """What is said of a worker that gets no requests for these models."""
    some = [f"model {name} is in another version here" for name in models[:SHOWN]]
    if others := len(models) - len(some):
        some.append(f"{others} more models are in another version here")
    return some


def worker_state(worker: Worker, left_out: Sequence[str]) -> dict[str, Any]:
    """What is known of a worker, as JSON for people.

    Args:
        left_out: the models for which others answer, since it has another version.
    """
    return {
        "up": worker.up,
        "ready": worker.health.ready,
        "reasons": [*worker.health.reasons, *differences(left_out)],
        "outstanding_images": worker.outstanding,
        "ejected": bool(worker.ejected),
    }
