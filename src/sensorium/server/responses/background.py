"""Responses that are made without a connection that waits for them."""

from __future__ import annotations

import asyncio

from sensorium.errors import InvalidRequestError
from sensorium.server.context import ServingContext
from sensorium.server.errors import log_unexpected
from sensorium.server.responses.answer import ResponseAnswer
from sensorium.server.responses.items import Item


def start(answer: ResponseAnswer) -> Item:
    """Begin to make a response, and return it as it is now.

    Raises OverloadedError when there is no room, InvalidRequestError when it cannot be stored.
    """
    context = answer.context
    with context.admission.enter(1):
        pass
    queued = answer.keep(answer.response("queued", output=[]))
    if not answer.stored:
        raise InvalidRequestError(
            "background is true, but this request is larger than what may be stored "
            "(--response-store-bytes); leave it out.",
            param="background",
        )
    key = (answer.tenant, answer.id)
    task = asyncio.create_task(_run(answer))
    server = context.server
    server.background[key] = task
    server.num_in_flight += 1  # the shutdown of the server waits for it
    context.model.hold()

    def ended(task: asyncio.Task[None]) -> None:
        del server.background[key]
        server.num_in_flight -= 1
        context.model.release()
        if task.cancelled():
            answer.keep(answer.response("cancelled", output=[]))

    task.add_done_callback(ended)
    return queued


async def cancel(context: ServingContext, tenant: str, response_id: str) -> None:
    """End a response that is being made; others stay as they are."""
    task = context.background.get((tenant, response_id))
    if task is not None:
        task.cancel()
        await asyncio.wait([task])


async def _run(answer: ResponseAnswer) -> None:
    """Make a response and store how it ended."""
    try:
        answer.keep(answer.response("in_progress", output=[]))
        await answer.whole()
    except Exception as error:
        log_unexpected(error, {"state": {"request_id": answer.request.request_id}})
        answer.failure(error)
