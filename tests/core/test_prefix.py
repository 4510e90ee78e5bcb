from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.core.blocks import IntegrityError
from sensorium.core.prefix import (
    MediaSlice,
    PrefixIndex,
    block_digest,
    extend_digests,
    media_by_block,
)
from sensorium.core.request import ItemSpan


def digests_of(
    token_ids: list[int],
    items: tuple[ItemSpan, ...] = (),
    *,
    block_size: int = 4,
    salt: bytes = b"",
) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, len(token_ids) // block_size, token_ids, items, block_size, salt)
    return digests


def test_equal_prefixes_have_equal_digests_up_to_where_they_differ() -> None:
    left = digests_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    right = digests_of([1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12])
    assert left[0] == right[0]
    assert left[1] != right[1]
    assert left[2] != right[2], "the chain carries a difference on"


def test_the_salt_separates_tenants_for_the_whole_prompt() -> None:
    ids = list(range(8))
    assert not set(digests_of(ids, salt=b"a")) & set(digests_of(ids, salt=b"b"))
    assert not set(digests_of(ids)) & set(digests_of(ids, salt=b"a"))


def test_an_image_distinguishes_blocks_with_the_same_placeholders() -> None:
    ids = [1, 9, 9, 9, 9, 9, 2, 3]
    cat, dog = (ItemSpan(name, "image", ((1, 5),)) for name in (b"cat", b"dog"))
    assert not set(digests_of(ids, (cat,))) & set(digests_of(ids, (dog,)))
    assert digests_of(ids, (cat,))[0] != digests_of(ids)[0], "literal placeholders are no image"


def test_where_the_item_starts_counts() -> None:
    ids = [9] * 8
    spans = [ItemSpan(b"cat", "image", ((start, 4),)) for start in range(5)]
    firsts = [digests_of(ids, (span,))[0] for span in spans[:4]]
    assert len(set(firsts)) == 4
    assert digests_of(ids, (spans[4],))[0] == digests_of(ids)[0], "an item behind is no matter"


def test_the_order_of_two_images_counts() -> None:
    ids = [9] * 4
    cat_dog = (ItemSpan(b"cat", "image", ((0, 2),)), ItemSpan(b"dog", "image", ((2, 2),)))
    dog_cat = (ItemSpan(b"dog", "image", ((0, 2),)), ItemSpan(b"cat", "image", ((2, 2),)))
    assert digests_of(ids, cat_dog) != digests_of(ids, dog_cat)


def test_structures_that_look_alike_when_joined_do_not_collide() -> None:
    parent = block_digest(None, [1])
    piece = MediaSlice(b"d", 0, 1, 0)
    different = [
        block_digest(None, [1, 2]),
        block_digest(None, [1], salt=b"\x02"),
        block_digest(None, [1], rope_length=4097),
        block_digest(None, [1], salt=b"\x02", rope_length=4097),
        block_digest(None, [], salt=b"ab"),
        block_digest(None, [], salt=b"a"),
        block_digest(parent, [1, 2]),
        block_digest(None, [1, 2], salt=parent),
        block_digest(parent, [1, 2], [piece]),
        block_digest(parent, [1, 2], [piece, piece]),
        block_digest(parent, [1, 2], [piece._replace(digest=b"dd")]),
        block_digest(parent, [1, 2], [piece._replace(block_pos=1)]),
        block_digest(parent, [1, 2], [piece._replace(num_embeds=2)]),
        block_digest(parent, [1, 2], [piece._replace(item_pos=1)]),
        block_digest(parent, [2**40]),
        block_digest(parent, [-1]),
    ]
    assert len(set(different)) == len(different)


def test_media_by_block_gives_the_documented_example() -> None:
    items = (ItemSpan(b"d", "image", ((2, 5),)),)
    assert media_by_block(items, 4, 0, 2) == {0: [(b"d", 2, 2, 0)], 1: [(b"d", 0, 3, 2)]}


def test_runs_with_separators_count_their_embeddings_through() -> None:
    items = (ItemSpan(b"d", "video", ((1, 2), (4, 3))),)
    assert media_by_block(items, 4, 0, 2) == {0: [(b"d", 1, 2, 0)], 1: [(b"d", 0, 3, 2)]}
    assert media_by_block(items, 4, 1, 2) == {1: [(b"d", 0, 3, 2)]}


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
    st.integers(1, 5),
    st.lists(st.integers(0, 20), min_size=1),
)
def test_digests_do_not_depend_on_how_they_were_extended(
    token_ids: list[int], block_size: int, cuts: list[int]
) -> None:
    items = (ItemSpan(b"d", "image", ((len(token_ids) // 2, 1),)),)
    num_blocks = len(token_ids) // block_size
    whole = digests_of(token_ids, items, block_size=block_size, salt=b"s")
    digests: list[bytes] = []
    for cut in sorted(cuts):
        extend_digests(digests, min(cut, num_blocks), token_ids, items, block_size, b"s")
    extend_digests(digests, num_blocks, token_ids, items, block_size, b"s")
    assert digests == whole


@settings(deadline=None)
@given(st.integers(1, 4), st.data())
def test_a_digest_determines_tokens_media_and_salt(block_size: int, data: st.DataObject) -> None:
    """All small prompts are told apart: digests are equal exactly when contents are."""
    seen: dict[bytes, object] = {}
    tokens = data.draw(st.lists(st.sampled_from([1, 9]), min_size=block_size, max_size=8))
    for start, length, name in itertools.product(range(3), range(1, 3), (b"a", b"ab")):
        if start + length > len(tokens):
            continue
        items = (ItemSpan(name, "image", ((start, length),)),)
        for block, digest in enumerate(digests_of(tokens, items, block_size=block_size)):
            end = (block + 1) * block_size
            content = tuple(
                (name, pos - start) if start <= pos < start + length else tokens[pos]
                for pos in range(end)
            )
            assert seen.setdefault(digest, content) == content
    assert len(set(map(repr, seen.values()))) == len(seen)


def test_longest_match_stops_at_the_first_unknown_digest() -> None:
    index = PrefixIndex()
    a, b, c = digests_of(list(range(12)))
    index.register(a, 7)
    index.register(c, 5)
    assert index.longest_match([a, b, c], 3) == [7]
    index.register(b, 2)
    assert index.longest_match([a, b, c], 3) == [7, 2, 5]
    assert index.longest_match([a, b, c], 2) == [7, 2]
    index.forget(7)
    assert index.longest_match([a, b, c], 3) == []


def test_the_first_block_of_a_digest_stays_the_one() -> None:
    index = PrefixIndex()
    assert index.register(b"x", 1)
    assert not index.register(b"x", 2)
    assert not index.register(b"y", 1)
    assert not index.holds(2)
    index.forget(2)
    assert index.longest_match([b"x"], 1) == [1]
    assert len(index) == 1
    index.check_integrity()


def test_integrity_notices_a_difference() -> None:
    index = PrefixIndex()
    index.register(b"x", 1)
    index._block_of[b"y"] = 1
    with pytest.raises(IntegrityError):
        index.check_integrity()
