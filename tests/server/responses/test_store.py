"""The store of responses keeps within its limits, whoever fills it."""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.errors import InvalidRequestError, NotFoundError
from sensorium.server.responses.store import Given, ResponseStore

Items = list[dict[str, Any]]


def item(name: str, text: str = "") -> dict[str, Any]:
    """An item."""
    return {"id": name, "type": "message", "text": text}


def response(name: str, text: str = "") -> dict[str, Any]:
    """A response with one output item."""
    return {"id": name, "output": [item(f"out_{name}", text)]}


def history(store: ResponseStore, name: str) -> list[str]:
    """The ids of the items up to the end of a response."""
    return [one["id"] for one in store.reading("t").history(name, "p")]


def put(
    store: ResponseStore,
    answer: dict[str, Any],
    items: Items | None = None,
    previous: str | None = None,
    tenant: str = "t",
) -> bool:
    """Store a response."""
    reading = store.reading(tenant)
    if previous is not None:
        reading.history(previous, "p")
    return store.put(tenant, answer, Given.of(items or [], reading.last))


async def test_a_chain_survives_the_deletion_of_its_beginning() -> None:
    store = ResponseStore(100, 1 << 20, 60)
    previous = None
    for name in "abc":
        assert put(store, response(name), [item(f"in_{name}")], previous)
        previous = name
    whole = ["in_a", "out_a", "in_b", "out_b", "in_c", "out_c"]
    assert history(store, "c") == whole
    store.delete("t", "a")
    store.delete("t", "b")
    assert history(store, "c") == whole
    assert [name for name, _ in store.input_items("t", "c")] == whole[:-1]
    with pytest.raises(NotFoundError):
        store.get("t", "a")
    store.delete("t", "c")
    assert (store.num_entries, store.num_bytes) == (0, 0)


async def test_replacing_keeps_the_history_and_counts_once() -> None:
    store = ResponseStore(100, 1 << 20, 60)
    put(store, response("a"), [item("in_a")])
    put(store, {"id": "b", "output": []}, [item("in_b")], "a")
    before = store.num_bytes
    put(store, response("b"), [item("in_b")], "a")
    assert store.num_entries == 2
    assert history(store, "b") == ["in_a", "out_a", "in_b", "out_b"]
    put(store, {"id": "b", "output": []}, [item("in_b")], "a")
    assert store.num_bytes == before
    store.delete("t", "a")
    store.delete("t", "b")
    assert store.num_bytes == 0


async def test_number_and_bytes_are_bounded() -> None:
    store = ResponseStore(3, 1 << 20, 60)
    for name in "abcde":
        put(store, response(name), [])
    assert store.num_entries == 3
    assert store.get("t", "e")["id"] == "e"
    small = ResponseStore(1000, 20_000, 60)
    previous = None
    for number in range(100):
        name = str(number)
        assert put(small, response(name, "x" * 500), [], previous)
        previous = name if number % 7 else None
        assert small.num_bytes <= 20_000
    assert not put(small, response("large", "x" * 20_000), [])
    assert not put(small, response("large", "x" * 20_000), tenant="new tenant")
    with pytest.raises(NotFoundError):
        small.get("t", "large")


async def test_one_tenant_does_not_push_out_another() -> None:
    store = ResponseStore(10, 1 << 20, 60)
    put(store, response("mine"), tenant="quiet")
    for number in range(100):
        put(store, response(str(number)), tenant="loud")
    assert store.get("quiet", "mine")["id"] == "mine"
    assert store.num_entries == 10
    for name in ("loud", ""):
        with pytest.raises(NotFoundError):
            store.get(name, "mine")


async def test_what_is_old_goes() -> None:
    now = 0.0
    store = ResponseStore(10, 1 << 20, 60, clock=lambda: now)
    put(store, response("a"), [])
    now = 30.0
    put(store, response("b"), [], "a")
    now = 61.0
    with pytest.raises(NotFoundError):
        store.get("t", "a")
    assert history(store, "b") == ["out_a", "out_b"]
    with pytest.raises(NotFoundError):
        store.reading("t").item("out_a", "p")
    assert store.reading("t").item("out_b", "p")["id"] == "out_b"
    now = 91.0
    with pytest.raises(NotFoundError):
        history(store, "b")
    assert store.num_bytes == 0


async def test_a_history_is_bounded() -> None:
    store = ResponseStore(10, 1 << 20, 60, max_history_bytes=3000)
    put(store, response("a", "x" * 2000), [])
    put(store, response("b", "x" * 2000), [], "a")
    assert len(history(store, "a")) == 1
    with pytest.raises(InvalidRequestError):
        history(store, "b")


async def test_what_came_before_is_kept_though_it_went_in_the_meantime() -> None:
    store = ResponseStore(100, 1 << 20, 60)
    put(store, response("a"), [item("in_a")])
    put(store, response("b"), [item("in_b")], "a")
    held = store.num_bytes
    reading = store.reading("t")
    reading.history("b", "p")
    store.delete("t", "a")
    store.delete("t", "b")
    assert store.num_bytes == 0
    assert store.put("t", response("c"), Given.of([item("in_c")], reading.last))
    assert history(store, "c") == ["in_a", "out_a", "in_b", "out_b", "in_c", "out_c"]
    store.delete("t", "c")
    assert store.num_bytes == 0
    put(store, response("a"), [item("in_a")])
    put(store, response("b"), [item("in_b")], "a")
    assert store.num_bytes == held


async def test_what_came_before_counts_again_where_nothing_holds_it() -> None:
    store = ResponseStore(100, 20_000, 60)
    put(store, response("a", "x" * 8_000))
    reading = store.reading("t")
    reading.history("a", "p")
    store.delete("t", "a")
    put(store, response("other"))
    assert not store.put("t", response("b", "x" * 6_000), Given.of([], reading.last))
    assert store.get("t", "other")["id"] == "other"


async def test_references_are_decoded_once_and_bounded_together() -> None:
    store = ResponseStore(10, 1 << 20, 60, max_history_bytes=10_000)
    put(store, response("a", "x" * 3000), [item("in_a", "y" * 20)])
    reading = store.reading("t")
    first = reading.item("out_a", "p")
    assert first == item("out_a", "x" * 3000)
    assert reading.item("out_a", "p") is first
    assert reading.item("in_a", "p") == item("in_a", "y" * 20)
    reading.item("out_a", "p")
    with pytest.raises(InvalidRequestError, match="more than 10000 bytes") as caught:
        reading.item("out_a", "q")
    assert caught.value.param == "q"
    after = store.reading("t")
    after.history("a", "p")
    with pytest.raises(InvalidRequestError):
        [after.item("out_a", "p") for _ in range(3)]
