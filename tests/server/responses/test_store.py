"""The store of responses keeps within its limits, whoever fills it."""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.errors import InvalidRequestError, NotFoundError
from sensorium.server.responses.store import ResponseStore


def item(name: str, text: str = "") -> dict[str, Any]:
    """An item."""
    return {"id": name, "type": "message", "text": text}


def response(name: str, text: str = "") -> dict[str, Any]:
    """A response with one output item."""
    return {"id": name, "output": [item(f"out_{name}", text)]}


def ids(items: list[dict[str, Any]]) -> list[str]:
    """The ids of items."""
    return [one["id"] for one in items]


async def test_a_chain_survives_the_deletion_of_its_beginning() -> None:
    store = ResponseStore(100, 1 << 20, 60)
    previous = None
    for name in "abc":
        assert store.put("t", response(name), [item(f"in_{name}")], previous)
        previous = name
    whole = ["in_a", "out_a", "in_b", "out_b", "in_c", "out_c"]
    assert ids(store.history("t", "c", "p")) == whole
    store.delete("t", "a")
    store.delete("t", "b")
    assert ids(store.history("t", "c", "p")) == whole
    assert ids(store.input_items("t", "c")) == whole[:-1]
    with pytest.raises(NotFoundError):
        store.get("t", "a")
    store.delete("t", "c")
    assert (store.num_entries, store.num_bytes) == (0, 0)


async def test_replacing_keeps_the_history_and_counts_once() -> None:
    store = ResponseStore(100, 1 << 20, 60)
    store.put("t", response("a"), [item("in_a")])
    store.put("t", {"id": "b", "output": []}, [item("in_b")], "a")
    before = store.num_bytes
    store.put("t", response("b"), [item("in_b")], "a")
    assert store.num_entries == 2
    assert ids(store.history("t", "b", "p")) == ["in_a", "out_a", "in_b", "out_b"]
    store.put("t", {"id": "b", "output": []}, [item("in_b")], "a")
    assert store.num_bytes == before
    store.delete("t", "a")
    store.delete("t", "b")
    assert store.num_bytes == 0


async def test_number_and_bytes_are_bounded() -> None:
    store = ResponseStore(3, 1 << 20, 60)
    for name in "abcde":
        store.put("t", response(name), [])
    assert store.num_entries == 3
    assert store.get("t", "e")["id"] == "e"
    small = ResponseStore(1000, 20_000, 60)
    previous = None
    for number in range(100):
        name = str(number)
        assert small.put("t", response(name, "x" * 500), [], previous)
        previous = name if number % 7 else None
        assert small.num_bytes <= 20_000
    assert not small.put("t", response("large", "x" * 20_000), [])
    assert not small.put("new tenant", response("large", "x" * 20_000), [])
    with pytest.raises(NotFoundError):
        small.get("t", "large")


async def test_one_tenant_does_not_push_out_another() -> None:
    store = ResponseStore(10, 1 << 20, 60)
    store.put("quiet", response("mine"), [])
    for number in range(100):
        store.put("loud", response(str(number)), [])
    assert store.get("quiet", "mine")["id"] == "mine"
    assert store.num_entries == 10
    for name in ("loud", ""):
        with pytest.raises(NotFoundError):
            store.get(name, "mine")


async def test_what_is_old_goes() -> None:
    now = 0.0
    store = ResponseStore(10, 1 << 20, 60, clock=lambda: now)
    store.put("t", response("a"), [])
    now = 30.0
    store.put("t", response("b"), [], "a")
    now = 61.0
    with pytest.raises(NotFoundError):
        store.get("t", "a")
    assert ids(store.history("t", "b", "p")) == ["out_a", "out_b"]
    with pytest.raises(NotFoundError):
        store.item("t", "out_a", "p")
    assert store.item("t", "out_b", "p")["id"] == "out_b"
    now = 91.0
    with pytest.raises(NotFoundError):
        store.history("t", "b", "p")
    assert store.num_bytes == 0


async def test_a_history_is_bounded() -> None:
    store = ResponseStore(10, 1 << 20, 60, max_history_bytes=3000)
    store.put("t", response("a", "x" * 2000), [])
    store.put("t", response("b", "x" * 2000), [], "a")
    assert len(store.history("t", "a", "p")) == 1
    with pytest.raises(InvalidRequestError):
        store.history("t", "b", "p")
