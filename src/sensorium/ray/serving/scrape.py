"""Metrics of the other processes for HTTP, for whichever of them is scraped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from prometheus_client.core import Metric
from ray import serve

from sensorium.metrics.servers import OtherServers
from sensorium.ray.tasks import own_task

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
"""Most time for the answers of the others; Prometheus itself waits for ten seconds."""

Answer = tuple[str, list[Metric]]
"""Name of a process, and its families."""


Results = list[Any]
"""Ray Serve's results of one call to each process, which are still to come."""


class Neighbours:
    """The processes of one deployment, as one of them asks for their metrics.

    ``num_wanted``: how many there should be, with this one. ``send``: sends the call that returns
    an ``Answer``, such as ``to_all`` makes.
    """

    def __init__(
        self, own_name: str, num_wanted: int, send: Callable[[], Coroutine[Any, Any, Results]]
    ) -> None:
        self._own_name, self._num_wanted, self._send = own_name, num_wanted, send

    async def ask(self) -> OtherServers:
        """Return what the others answered in time; that none does is no error."""
        answers: list[Answer | None] = []
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                # A context of its own, as in the index: Ray Serve would count it to the scrape.
                sent = await own_task(self._send())
        except Exception as error:  # Ray Serve's are no RayError
            logger.info("other processes cannot be asked: %s", type(error).__name__)
        else:
            answers = await asyncio.gather(*(_in_time(result.get_async()) for result in sent))
        found = dict(answer for answer in answers if answer is not None)
        found.pop(self._own_name, None)
        missing = max(0, self._num_wanted - 1 - len(found))
        return OtherServers(self._own_name, found, missing)


def to_all(method: str) -> Callable[[], Coroutine[Any, Any, Results]]:
    """Return what calls a method of each process of the deployment that this one is of."""
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)

    async def send() -> Results:
        # Not ``results_async``, whose one timeout would lose the answers that came in time.
        results: Results = await handle.broadcast(method)._fetch_replica_results_async()
        return results

    return send


async def _in_time(answer: Coroutine[Any, Any, Answer]) -> Answer | None:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await answer
    except Exception as error:  # it is busy, or has ended
        logger.info("a process for HTTP did not answer: %s", type(error).__name__)
        return None
