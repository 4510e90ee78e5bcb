"""Pages of the items that a response is an answer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.errors import InvalidRequestError, NotFoundError
from sensorium.server.payload import abbreviate
from sensorium.server.responses.store import NamedItem

MOST_ITEMS = 100
_USUAL_ITEMS = 20
_ORDERS = ("asc", "desc")


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list: ``limit`` entries after the entry ``after``, in an order."""

    limit: int
    order: str
    after: str | None

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Page:
        """Return the page that the parameters of a URL ask for. Raises InvalidRequestError."""
        text, order = query.get("limit", str(_USUAL_ITEMS)), query.get("order", "desc")
        limit = int(text) if text.isascii() and text.isdigit() and len(text) < 5 else 0
        if not 1 <= limit <= MOST_ITEMS:
            raise InvalidRequestError(
                f"limit must be a number from 1 to {MOST_ITEMS}, got {abbreviate(text)}.",
                param="limit",
            )
        if order not in _ORDERS:
            raise InvalidRequestError(
                f"order must be 'asc' or 'desc', got {abbreviate(order)}.", param="order"
            )
        return cls(limit, order, query.get("after"))

    def cut(self, items: Sequence[NamedItem]) -> dict[str, Any]:
        """Return the list object with the items of this page; ``items`` are the oldest first.

        Raises NotFoundError when ``after`` names none of them.
        """
        found = list(items if self.order == "asc" else reversed(items))
        if self.after is not None:
            at = next((i for i, (name, _) in enumerate(found) if name == self.after), None)
            if at is None:
                raise NotFoundError(
                    f"after names {abbreviate(self.after)}, which is none of these items.",
                    param="after",
                )
            found = found[at + 1 :]
        shown = found[: self.limit]
        return {
            "object": "list",
            "data": [item for _, item in shown],
            "first_id": shown[0][0] if shown else "",
            "last_id": shown[-1][0] if shown else "",
            "has_more": len(found) > len(shown),
        }
