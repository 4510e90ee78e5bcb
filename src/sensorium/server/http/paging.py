"""Pages of lists: ``after``, ``limit`` and ``order`` of a query, and the list of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from sensorium.config import suggestion
from sensorium.errors import InvalidRequestError

T = TypeVar("T")

_NAMES = ("after", "limit", "order")


@dataclass(frozen=True, slots=True)
class Page:
    """The part of a list that a client asks for; ``more`` are parameters of the route."""

    after: str | None
    limit: int
    newest_first: bool
    more: dict[str, str] = field(default_factory=dict)


def page_of(request: Request, *, default: int, most: int, more: Sequence[str] = ()) -> Page:
    """Read the query of a list. Raises InvalidRequestError for unknown or wrong parameters."""
    given = dict(request.query_params)
    for name in given:
        if name not in (*_NAMES, *more):
            raise InvalidRequestError(
                f"Unknown query parameter {name[:80]!r}.{suggestion(name, [*_NAMES, *more])}",
                param=name[:80],
            )
    limit = given.get("limit", str(default))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= most):
        raise InvalidRequestError(
            f"limit must be an integer from 1 to {most}, got {limit[:80]!r}.", param="limit"
        )
    order = given.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(
            f"order must be 'asc' or 'desc', got {order[:80]!r}.", param="order"
        )
    others = {name: given[name] for name in more if name in given}
    return Page(given.get("after"), int(limit), order == "desc", others)


def paged(
    oldest_first: Sequence[T], page: Page, id_of: Callable[[T], str], show: Callable[[T], Any]
) -> dict[str, Any]:
    """Return the list of an answer. Raises InvalidRequestError for an ``after`` that is not there.

    Args:
        oldest_first: All entries.
        page: The part that is wanted.
        id_of: Returns the id of an entry.
        show: Returns an entry's object in the answer.
    """
    entries = list(reversed(oldest_first)) if page.newest_first else list(oldest_first)
    start = 0
    if page.after is not None:
        ids = [id_of(entry) for entry in entries]
        if page.after not in ids:
            raise InvalidRequestError(
                f"after must be the id of an entry of the list, got {page.after[:80]!r}.",
                param="after",
            )
        start = ids.index(page.after) + 1
    chosen = entries[start : start + page.limit]
    return {
        "object": "list",
        "data": [show(entry) for entry in chosen],
        "first_id": id_of(chosen[0]) if chosen else None,
        "last_id": id_of(chosen[-1]) if chosen else None,
        "has_more": start + len(chosen) < len(entries),
    }
