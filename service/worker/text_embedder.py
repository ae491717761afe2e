"""Embeds the texts of label sets through the queue that requests wait in, too."""

import asyncio
from collections.abc import Sequence

import numpy as np

from models.model import Model
from service.clients import client
from service.errors import QueueFullError, ServiceError
from service.types import Call, ImageResult
from service.worker.admission import Claim
from service.worker.execution_plan import ExecutionPlan, plan_execution, resolve_for
from service.worker.pipeline import Pipeline

# The texts of a larger label set wait behind interactive requests.
MAX_INTERACTIVE_TEXTS = 100


class TextEmbedder:
    """Embeds texts a few at a time, so that other requests get their turns."""

    def __init__(self, pipeline: Pipeline, max_batch_size: int) -> None:
        self._pipeline = pipeline
        self._max_batch_size = max_batch_size

    async def embed(self, model: Model, texts: Sequence[str]) -> np.ndarray:
        """(N, D) embeddings of texts by this model, also if another has replaced it.

        Raises:
            ServiceError: a text could not be embedded, or the model's trunk was unloaded.
        """
        call = Call(model.name, "embed", {"normalize": True})
        plans = {"text": plan_execution([resolve_for(model, call, "text")])}
        bulk = len(texts) > MAX_INTERACTIVE_TEXTS
        rows: list[np.ndarray] = [np.empty(0)] * len(texts)
        remaining = iter(enumerate(texts))

        async def embed_some() -> None:
            for position, text in remaining:
                [result] = await self._run_patiently(plans, text, bulk)
                output = result.error or result.outputs[0]
                if isinstance(output, ServiceError):
                    raise output
                rows[position] = output["embedding"]

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(texts), 2 * self._max_batch_size)):
                    group.create_task(embed_some())
        except* ServiceError as errors:
            raise errors.exceptions[0] from None
        return np.stack(rows)

    async def _run_patiently(
        self, plans: dict[str, ExecutionPlan], text: str, bulk: bool
    ) -> list[ImageResult]:
        """Run one text; while the queue is full, wait for a place."""
        while True:
            try:
                return await self._pipeline.run(plans, [text], Claim(client.get(), bulk))
            except QueueFullError:
                await asyncio.sleep(0.02)
