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


@settings(deadline=None, max_examples=60)
@given(
    sent=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(0, 9)), max_size=60),
    capacity=st.sampled_from([24, 10_000]),
)
def test_searches_over_prefixes_find_what_looking_at_each_finds(
    sent: list[tuple[int, int, int]], capacity: int
) -> None:
    """Prompts begin alike and part after five prefixes; a few holders, so that none is dropped."""
    memory = HolderMemory(capacity)

    def digests(prompt: int, length: int) -> list[bytes]:
        return [bytes([prompt if place >= 5 else 99, place]) for place in range(length)]

    for mark, (prompt, length, holder) in enumerate(sent):
        for digest in reversed(digests(prompt, length)):
            memory.add(digest, holder, mark)
    for prompt in range(4):
        whole = digests(prompt, 12)
        sizes = [len(memory.holders(digest)) for digest in whole]
        num = memory.num_known(whole)
        assert num == sum(size > 0 for size in sizes)
        for holder in range(10):
            marks = [memory.holders(digest).get(holder) for digest in whole]
            assert [memory.mark(digest, holder) for digest in whole] == marks
            if capacity == 10_000:
                held = max((i + 1 for i, m in enumerate(marks) if m is not None), default=0)
                assert memory.num_held(whole, num, holder) == held
        if capacity == 10_000 and num:
            wider = [i + 1 for i in range(num) if sizes[i] > sizes[num - 1]]
            assert memory.next_wider(whole, num) == max(wider, default=0)


def test_holders_of_prefixes_that_many_have_are_found() -> None:
    """The first prefix has too many holders to know them all."""
    memory = HolderMemory(10_000)
    for holder in range(100):
        memory.add(b"own %d" % holder, holder, 0)
        memory.add(b"popular", holder, 0)
    assert memory.num_held([b"popular", b"own 3"], 2, 3) == 2
    assert memory.num_held([b"popular", b"own 3"], 2, 99) == 1
    assert memory.num_held([b"popular", b"own 3"], 2, 4) == 0
    assert memory.next_wider([b"popular", b"own 3"], 2) == 1
    assert memory.next_wider([b"popular", b"popular"], 2) == 1


def test_shares_are_those_of_the_latest() -> None:
    popularity = Popularity(window=100)
    for number in range(150):
        popularity.add(b"new" if number % 2 else b"")
    assert popularity.share(b"new") == 0.5
    for _ in range(200):
        popularity.add(b"newer")
    assert popularity.share(b"new") == 0
    assert popularity.count(b"newer") >= 100
