"""Tasks that belong to no request of Ray Serve."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def own_task(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task in a context of its own.

    Ray Serve keeps the request in the context: it gives all calls from there the same id, takes two
    of them that wait at a time for one, and cancels them with the request.
    """
    return asyncio.create_task(work, context=contextvars.Context())
