"""Memory of who has what: bounded, the latest stays."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.distributed.routing.memory import HolderMemory, Popularity


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 80), st.integers(0, 99)), max_size=300)
)
def test_the_latest_pairs_are_there_and_all_are_bounded(
    added: list[tuple[int, int, int]],
) -> None:
    capacity = 40
    memory = HolderMemory(capacity)
    for number, (content, holder, mark) in enumerate(added):
        memory.add(bytes([content]), holder, mark)
        assert len(memory) <= capacity + HolderMemory.MOST_HOLDERS
        assert len(memory) == sum(len(memory.holders(bytes([c]))) for c in range(31))
        latest = {(c, h): m for c, h, m in added[max(0, number - 10) : number + 1]}
        for (c, h), m in latest.items():
            assert memory.holders(bytes([c]))[h] == m


def test_many_holders_of_one_content_are_bounded() -> None:
    memory = HolderMemory(1000)
    for holder in range(200):
        memory.add(b"popular", holder, holder)
    assert set(memory.holders(b"popular")) == set(range(200 - memory.MOST_HOLDERS, 200))


def test_shares_are_those_of_the_latest() -> None:
    popularity = Popularity(window=100)
    for number in range(150):
        popularity.add(b"new" if number % 2 else b"")
    assert popularity.share(b"new") == 0.5
    for _ in range(200):
        popularity.add(b"newer")
    assert popularity.share(b"new") == 0
    assert popularity.count(b"newer") >= 100
