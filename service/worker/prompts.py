"""Class embeddings of label sets, computed once and cached."""

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.inputs.prompts import ensemble, prompts
from models.model import Model
from service.metrics import Metrics

EmbedTexts = Callable[[Model, Sequence[str]], Awaitable[np.ndarray]]


@dataclass(slots=True)
class _Flight:
    """A running computation, and the number of requests that wait for it."""

    task: "asyncio.Task[np.ndarray]"
    waiters: int = 0


class PromptCache:
    """A least-recently-used cache of class embeddings.

    Keys are (model, labels, templates), values are (labels, D) float32 arrays.
    """

    def __init__(self, embed: EmbedTexts, limit_bytes: int, metrics: Metrics) -> None:
        """
        Args:
            embed: returns the (N, D) embeddings of N texts; runs them through the text trunk's
                queue.
            limit_bytes: the size of the cache.
        """
        self._embed = embed
        self._limit_bytes = limit_bytes
        self._metrics = metrics
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._flights: dict[str, _Flight] = {}

    async def get(
        self, model: Model, labels: Sequence[str], templates: Sequence[str]
    ) -> np.ndarray:
        """The class embeddings, (labels, D) float32.

        Concurrent requests for the same ones share one computation. It is cancelled when all of
        them are.
        """
        key = _key(model, labels, templates)
        kept = self._find(key)
        self._metrics.label_sets.labels("miss" if kept is None else "hit").inc()
        if kept is not None:
            return kept
        flight = self._flights.get(key)
        if flight is None:
            task = asyncio.create_task(self._compute(key, model, labels, templates))
            flight = self._flights[key] = _Flight(task)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0:
                flight.task.cancel()
                if self._flights.get(key) is flight:
                    del self._flights[key]

    def prepare(self, model: Model, labels: Sequence[str], templates: Sequence[str]) -> None:
        """Compute and cache the embeddings in the calling thread, while the model is loaded."""
        classes = model.class_embeddings(labels, templates)
        self._keep(_key(model, labels, templates), classes)

    async def _compute(
        self, key: str, model: Model, labels: Sequence[str], templates: Sequence[str]
    ) -> np.ndarray:
        texts = prompts(labels, templates)
        classes = ensemble(await self._embed(model, texts), len(templates))
        self._keep(key, classes)
        return classes

    def _find(self, key: str) -> np.ndarray | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: str, classes: np.ndarray) -> None:
        with self._lock:
            replaced = self._kept.pop(key, None)
            self._bytes += classes.nbytes - (0 if replaced is None else replaced.nbytes)
            self._kept[key] = classes
            while self._bytes > self._limit_bytes and self._kept:
                _, evicted = self._kept.popitem(last=False)
                self._bytes -= evicted.nbytes


def _key(model: Model, labels: Sequence[str], templates: Sequence[str]) -> str:
    parts = json.dumps([model.digest, list(labels), list(templates)])
    return hashlib.sha256(parts.encode()).hexdigest()
