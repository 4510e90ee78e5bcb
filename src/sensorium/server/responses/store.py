"""Stored responses: in memory, bounded in number, bytes and age, each tenant's apart."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from sensorium.errors import InvalidRequestError, NotFoundError
from sensorium.server.payload import encode

Item = dict[str, Any]
NamedItem = tuple[str, msgspec.Raw]
"""The id of an item, and the item as JSON."""

ENTRY_BYTES = 1024
"""Bytes that a response counts for besides its JSON."""
TURN_BYTES = 256
"""Bytes that its turn in a conversation counts for besides its JSON."""
ID_BYTES = 192
"""Bytes that the id of an item counts for."""


@dataclass(slots=True, eq=False)
class Turn:
    """Input and output items of a response as JSON. Responses that continue it hold it, too."""

    parent: Turn | None
    input: bytes
    output: bytes
    num_holders: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that the turn counts for."""
        return TURN_BYTES + len(self.input) + len(self.output)

    def items(self) -> list[NamedItem]:
        """Return its items with their ids; none of them is decoded."""
        return [*_named(self.input), *_named(self.output)]


@dataclass(frozen=True, slots=True)
class Given:
    """Items that a response is an answer to, as JSON, and the turn before them."""

    items: bytes
    item_ids: tuple[str, ...]
    parent: Turn | None = None

    @classmethod
    def of(cls, items: Sequence[Item], parent: Turn | None = None) -> Given:
        """Return items as they are stored. Takes a while for large ones."""
        return cls(encode(items), tuple(item["id"] for item in items), parent)


class _Name(msgspec.Struct):
    """Id of an item, read without its other members."""

    id: str


@dataclass(slots=True)
class _Entry:
    """A stored response as JSON. ``item_ids``: those that may be referred to."""

    response: bytes
    turn: Turn
    item_ids: tuple[str, ...]
    expires_at: float

    @property
    def num_bytes(self) -> int:
        """Bytes that the entry counts for, besides those of its turns."""
        return ENTRY_BYTES + len(self.response) + ID_BYTES * len(self.item_ids)


@dataclass(slots=True)
class _Shelf:
    """The responses that one tenant has stored, the oldest first."""

    entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)
    owners: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0

    def hold(self, turn: Turn) -> None:
        """Count a turn that an entry holds, and those before it that nothing held any more."""
        last: Turn | None = turn
        while last is not None:
            last.num_holders += 1
            if last.num_holders > 1:
                return
            self.num_bytes += last.num_bytes
            last = last.parent

    def put(self, response_id: str, entry: _Entry) -> None:
        """Add an entry, whose turn is held already."""
        self.entries[response_id] = entry
        self.owners |= dict.fromkeys(entry.item_ids, response_id)
        self.num_bytes += entry.num_bytes

    def remove(self, response_id: str) -> None:
        """Remove an entry, and the turns that no other one holds."""
        entry = self.entries.pop(response_id)
        self.num_bytes -= entry.num_bytes
        for item_id in entry.item_ids:
            if self.owners.get(item_id) == response_id:
                del self.owners[item_id]
        turn: Turn | None = entry.turn
        while turn is not None:
            turn.num_holders -= 1
            if turn.num_holders:
                return
            self.num_bytes -= turn.num_bytes
            turn = turn.parent


class ResponseStore:
    """Stored responses. Past a limit, the oldest of the tenant that holds the most go.

    A response that continues another one keeps what came before it, also when the other one is
    deleted or evicted. Reading is possible in any thread; ``put`` belongs to an event loop.

    Args:
        max_entries: The most responses; 0 stores none.
        max_bytes: The most bytes of all, as JSON.
        seconds: How long a response is kept.
        max_history_bytes: The most bytes of one conversation that may be continued.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        max_entries: int,
        max_bytes: int,
        seconds: float,
        *,
        max_history_bytes: int = 1 << 27,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._max_history_bytes = max_history_bytes
        self._clock = clock
        self._shelves: dict[str, _Shelf] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._lock = threading.RLock()

    @property
    def enabled(self) -> bool:
        """True when anything can be stored."""
        return self._max_entries > 0 and self._max_bytes > 0

    @property
    def num_entries(self) -> int:
        """Responses that are stored."""
        return sum(len(shelf.entries) for shelf in self._shelves.values())

    @property
    def num_bytes(self) -> int:
        """Bytes that they count for."""
        return sum(shelf.num_bytes for shelf in self._shelves.values())

    def put(self, tenant: str, response: Item, given: Given) -> bool:
        """Store a response with what it is an answer to, in place of an earlier one of its id.

        Returns false when it is larger than all that may be stored.
        """
        ids = (*given.item_ids, *(item["id"] for item in response["output"]))
        text, made = encode(response), encode(response["output"])
        with self._lock:
            self._expire()
            shelf = self._shelves.get(tenant) or _Shelf()
            turn = Turn(given.parent, given.items, made)
            entry = _Entry(text, turn, ids, self._clock() + self._seconds)
            added = sum(one.num_bytes for one in _turns(turn) if not one.num_holders)
            if entry.num_bytes + added > self._max_bytes or not self._max_entries:
                return False
            shelf.hold(turn)
            if response["id"] in shelf.entries:
                shelf.remove(response["id"])
            shelf.put(response["id"], entry)
            self._shelves[tenant] = shelf
            self._evict()
            self._watch()
            return response["id"] in shelf.entries

    def get(self, tenant: str, response_id: str) -> Item:
        """Return a stored response. Raises NotFoundError."""
        return cast(Item, msgspec.json.decode(self._entry(tenant, response_id).response))

    def input_items(self, tenant: str, response_id: str) -> list[NamedItem]:
        """Return the items that a response is an answer to, the oldest first.

        Raises NotFoundError.
        """
        turn = self._entry(tenant, response_id).turn
        before = [item for earlier in _turns(turn.parent) for item in earlier.items()]
        return [*before, *_named(turn.input)]

    def history_bytes(self, tenant: str, response_id: str | None) -> int:
        """Return the bytes of a conversation up to the end of a response; 0 for unknown ones."""
        with self._lock:
            shelf = self._shelves.get(tenant)
            entry = shelf.entries.get(response_id or "") if shelf is not None else None
        return sum(turn.num_bytes for turn in _turns(entry.turn)) if entry is not None else 0

    def reading(self, tenant: str) -> Reading:
        """Return what reads the stored items that one request is made of."""
        return Reading(self, tenant, self._max_history_bytes)

    def turn(self, tenant: str, response_id: str, param: str) -> Turn:
        """Return the turn of a response. Raises NotFoundError with ``param``."""
        return self._entry(tenant, response_id, param).turn

    def turn_of_item(self, tenant: str, item_id: str) -> Turn | None:
        """Return the turn that has an item; None where none is stored."""
        with self._lock:
            self._expire()
            shelf = self._shelves.get(tenant)
            if shelf is None or item_id not in shelf.owners:
                return None
            return shelf.entries[shelf.owners[item_id]].turn

    def delete(self, tenant: str, response_id: str) -> None:
        """Delete a stored response. Raises NotFoundError."""
        with self._lock:
            self._entry(tenant, response_id)
            self._remove(tenant, response_id)

    def _entry(self, tenant: str, response_id: str, param: str | None = None) -> _Entry:
        with self._lock:
            self._expire()
            shelf = self._shelves.get(tenant)
            entry = shelf.entries.get(response_id) if shelf is not None else None
        if entry is None:
            raise NotFoundError(
                f"There is no response {response_id[:128]!r} here: it was never stored, or it was "
                "deleted, or it had to make room (--response-store-entries, "
                "--response-store-bytes, --response-store-seconds).",
                param=param,
            )
        return entry

    def _remove(self, tenant: str, response_id: str) -> None:
        shelf = self._shelves[tenant]
        shelf.remove(response_id)
        if not shelf.entries:
            del self._shelves[tenant]

    def _expire(self) -> None:
        """Remove what is too old."""
        now = self._clock()
        for tenant, shelf in list(self._shelves.items()):
            while shelf.entries:
                response_id, entry = next(iter(shelf.entries.items()))
                if entry.expires_at > now:
                    break
                self._remove(tenant, response_id)

    def _evict(self) -> None:
        """Remove the oldest responses until all are within the limits."""
        while self.num_entries > self._max_entries:
            self._remove_oldest(lambda shelf: len(shelf.entries))
        while self.num_bytes > self._max_bytes:
            self._remove_oldest(lambda shelf: shelf.num_bytes)

    def _remove_oldest(self, size: Callable[[_Shelf], int]) -> None:
        tenant = max(self._shelves, key=lambda name: size(self._shelves[name]))
        self._remove(tenant, next(iter(self._shelves[tenant].entries)))

    def _watch(self) -> None:
        """Wake when the next response is too old, though nobody asks for one."""
        if self._timer is not None or not self._shelves:
            return
        firsts = [next(iter(shelf.entries.values())) for shelf in self._shelves.values()]
        due = min(entry.expires_at for entry in firsts) - self._clock()
        self._timer = asyncio.get_running_loop().call_later(max(1.0, due), self._on_timer)

    def _on_timer(self) -> None:
        with self._lock:
            self._timer = None
            self._expire()
            self._watch()


class Reading:
    """Stored items that one request is made of: its history, and those that it refers to.

    Each is decoded once, and what all of them have, repeated ones each time, is bounded.
    The attribute ``last``: the turn that the request continues; None for a new conversation.
    """

    def __init__(self, store: ResponseStore, tenant: str, max_bytes: int) -> None:
        self.last: Turn | None = None
        self._store = store
        self._tenant = tenant
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._raw: dict[Turn, dict[str, msgspec.Raw]] = {}
        self._items: dict[str, Item] = {}

    def history(self, response_id: str, param: str) -> list[Item]:
        """Return all items up to the end of a response, which the request continues.

        Raises NotFoundError, and InvalidRequestError when they are too large, with ``param``.
        """
        self.last = self._store.turn(self._tenant, response_id, param)
        turns = _turns(self.last)
        self._count(
            sum(turn.num_bytes for turn in turns),
            "The conversation before this request has",
            "Begin another one.",
            param,
        )
        texts = (text for turn in turns for text in (turn.input, turn.output))
        return [item for text in texts for item in cast(list[Item], msgspec.json.decode(text))]

    def item(self, item_id: str, param: str) -> Item:
        """Return a stored item, the same object each time.

        Raises NotFoundError, and InvalidRequestError when all items together are too large, with
        ``param``.
        """
        raw = self._raw_item(item_id, param)
        self._count(
            memoryview(raw).nbytes,
            "The stored items that this request refers to, with those before it, have",
            "Refer to fewer items.",
            param,
        )
        found = self._items.get(item_id)
        if found is None:
            found = self._items[item_id] = cast(Item, msgspec.json.decode(raw))
        return found

    def _raw_item(self, item_id: str, param: str) -> msgspec.Raw:
        """Return a stored item as JSON. Raises NotFoundError with ``param``."""
        turn = self._store.turn_of_item(self._tenant, item_id)
        if turn is not None:
            items = self._raw.get(turn)
            if items is None:  # of several with one id, the first
                items = self._raw[turn] = dict(reversed(turn.items()))
            if item_id in items:
                return items[item_id]
        raise NotFoundError(
            f"{param} names {item_id[:128]!r}, which is no item of a response that is stored here; "
            "send the item itself.",
            param=param,
        )

    def _count(self, num_bytes: int, what: str, advice: str, param: str) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            raise InvalidRequestError(
                f"{what} more than {self._max_bytes} bytes, the limit of a body "
                f"(--max-body-bytes). {advice}",
                param=param,
            )


def _turns(last: Turn | None) -> list[Turn]:
    """Return the turns up to ``last``, the oldest first."""
    found = []
    while last is not None:
        found.append(last)
        last = last.parent
    return found[::-1]


def _named(items: bytes) -> list[NamedItem]:
    """Return the items of a list with their ids; none of them is decoded."""
    names = msgspec.json.decode(items, type=list[_Name])
    raws = msgspec.json.decode(items, type=list[msgspec.Raw])
    return [(name.id, raw) for name, raw in zip(names, raws, strict=True)]
