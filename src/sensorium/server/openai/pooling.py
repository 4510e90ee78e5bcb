"""Running the prompts of one request for embeddings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sensorium.errors import located
from sensorium.outputs import PoolingRequestOutput
from sensorium.params import PoolingParams
from sensorium.server.admission import Place
from sensorium.server.context import ModelContext

if TYPE_CHECKING:
    from sensorium.engine.prompts.types import Prompt

PooledOutput = PoolingRequestOutput[np.ndarray]

BATCH_SIZE = 16
"""Inputs that are sent, or embeddings that are written, in one iteration of the event loop."""


@dataclass(frozen=True, slots=True)
class PoolingRequest:
    """The prompts of one HTTP request, with the parameters that they share.

    ``param``: the field that has the prompts. ``rename``: maps the index of a prompt and a place in
    it to the client's name of the place.
    """

    context: ModelContext
    model: str
    params: PoolingParams
    prompts: Sequence[Prompt]
    request_id: str
    priority: int
    param: str = "input"
    rename: Callable[[int, str], str] = lambda index, place: place

    @property
    def modalities(self) -> tuple[str, ...]:
        """Return the modalities that the model takes besides text."""
        return tuple(self.context.frontend.input_processor.modalities)


async def pooled_outputs(pooling: PoolingRequest) -> list[PooledOutput]:
    """Return the outputs of all prompts, in order. The first error of any of them ends all."""
    context = pooling.context

    async def one(index: int, prompt: Prompt, place: Place) -> PooledOutput:
        with located(rename=lambda param: pooling.rename(index, param)):
            output = await context.frontend.embed(
                prompt,
                pooling.params,
                request_id=context.engine_id(pooling.request_id),
                priority=pooling.priority,
            )
        place.leave()
        return output

    with context.admission.enter(len(pooling.prompts), pooling.param) as places:
        tasks: list[asyncio.Task[PooledOutput]] = []
        try:
            for index, (prompt, place) in enumerate(zip(pooling.prompts, places, strict=True)):
                tasks.append(asyncio.create_task(one(index, prompt, place)))
                if len(tasks) % BATCH_SIZE == 0:
                    await asyncio.sleep(0)
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
