"""Which worker's description of a model a gateway shows, if workers differ."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from models.description import HeadDescription, ModelDescription
from service.remote.worker import Worker

# The states of models and heads, the closest to answering first.
STATES = ("ready", "loading", "fitting", "queued", "failed", "unloaded")


def best_description(name: str, workers: Iterable[Worker]) -> ModelDescription | None:
    """A model's description by the worker where it is closest to answering, with the change of it
    that failed on any worker; None if unknown."""
    models = [worker.models[name] for worker in workers if name in worker.models]
    best = min(models, key=closeness, default=None)
    error = next((model.update_error for model in models if model.update_error), None)
    return best if best is None or error is None else replace(best, update_error=error)


def closeness(model: HeadDescription) -> tuple[bool, int]:
    """A sort key, lowest for models that answer, highest for states of newer workers."""
    known = model.state in STATES
    return not model.is_ready, STATES.index(model.state) if known else len(STATES)


def worker_state(worker: Worker) -> dict[str, Any]:
    """What is known of a worker, as JSON for people."""
    return {
        "up": worker.up,
        "ready": worker.health.ready,
        "reasons": list(worker.health.reasons),
        "outstanding_images": worker.outstanding,
        "ejected": bool(worker.ejected),
    }
