"""Keys of requests: equal prefixes have equal digests, whatever follows them."""

from __future__ import annotations

import itertools
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.core.request import ItemSpan
from sensorium.distributed.routing import request_key
from sensorium.distributed.routing.key import MOST_MEDIA, PREFIX_LENGTHS, PREFIX_TOKENS


def image(name: str, start: int, num_embeds: int) -> ItemSpan:
    return ItemSpan(name.encode() * 8, "image", ((start, num_embeds),))


@settings(deadline=None, max_examples=40)
@given(shared=st.integers(0, 1500), first=st.integers(1, 900), second=st.integers(1, 900))
def test_prompts_share_the_digests_of_what_they_share(shared: int, first: int, second: int) -> None:
    head = list(range(shared))
    one = request_key([*head, *[100_001] * first])
    other = request_key([*head, *[100_002] * second])
    num_shared = sum(length <= shared for length in PREFIX_LENGTHS)
    assert one.prefixes[:num_shared] == other.prefixes[:num_shared]
    assert not set(one.prefixes[num_shared:]) & set(other.prefixes)
    assert one.num_tokens == shared + first


def test_a_sixteenth_at_most_is_overlooked_and_digests_are_few() -> None:
    for shorter, longer in itertools.pairwise(PREFIX_LENGTHS):
        assert longer - shorter <= max(PREFIX_TOKENS, shorter / 16)
    key = request_key(range(2_000_000))
    assert len(key.prefixes) == len(PREFIX_LENGTHS) < 200
    assert len(pickle.dumps(key)) < 3000
    assert pickle.loads(pickle.dumps(key)) == key


@pytest.mark.parametrize("name", ["salt", "adapter", "rope_length"])
def test_what_caches_depend_on_is_in_all_prefixes(name: str) -> None:
    tokens = [7] * 200
    value = 4096 if name == "rope_length" else b"x"
    plain, special = request_key(tokens), request_key(tokens, **{name: value})
    assert not set(plain.prefixes) & set(special.prefixes)
    assert request_key(tokens, salt=b"a", adapter=b"bc") != request_key(
        tokens, salt=b"ab", adapter=b"c"
    )


def test_prefixes_cover_the_media_in_them() -> None:
    tokens = [7] * 400
    cat, dog = (request_key(tokens, [image(name, 130, 20)]) for name in ("cat", "dog"))
    assert cat.prefixes[:4] == dog.prefixes[:4]
    assert not set(cat.prefixes[4:]) & set(dog.prefixes[4:])
    assert [num for _, num in cat.media] == [20]
    elsewhere = request_key(tokens, [image("cat", 131, 20)])
    assert elsewhere.prefixes[4:] != cat.prefixes[4:]
    assert elsewhere.media == cat.media


def test_many_items_are_bounded() -> None:
    items = [image(f"{i:04}", 2 * i, 2) for i in range(100)]
    key = request_key([7] * 200, items)
    assert len(key.media) == MOST_MEDIA + 1
    assert key.media[-1] == (b"", 2 * (100 - MOST_MEDIA))


def test_short_prompts_have_no_prefix() -> None:
    assert request_key([1, 2, 3]).prefixes == ()
