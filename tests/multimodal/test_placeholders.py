from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import PlaceholderMismatchError
from sensorium.multimodal.items import Features
from sensorium.multimodal.placeholders import expand
from sensorium.multimodal.processor import Replacement
from tests.multimodal.support import FakeProcessor, item


class BothProcessor(FakeProcessor):
    modalities = ("image", "video")


class FramedProcessor(FakeProcessor):
    """The placeholder is a pad (9).

    It becomes start (5), rows of two pads ended by 7, and an end (6).
    """

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        rows = features.num_embeds // 2
        ids = (5, *((9, 9, 7) * rows), 6)
        return Replacement(ids, tuple((1 + 3 * row, 2) for row in range(rows)))


class ThreeTokenProcessor(FakeProcessor):
    """The placeholder is start, pad, end (5, 9, 6), and only the pad is repeated."""

    placeholders = {"image": (5, 9, 6)}  # noqa: RUF012

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        num = features.num_embeds
        return Replacement((5, *(9,) * num, 6), ((1, num),))


def test_one_placeholder_becomes_the_items_length() -> None:
    found = expand([1, 9, 5], [item(3)], FakeProcessor())
    assert found.token_ids == (1, 9, 9, 9, 5)
    assert found.items[0].runs == ((1, 3),)
    assert found.num_item_tokens == {"image": 3}


def test_items_go_to_placeholders_in_order() -> None:
    items = [item(2), item(1), item(3)]
    found = expand((9, 1, 9, 9, 2), items, FakeProcessor())
    assert found.token_ids == (9, 9, 1, 9, 9, 9, 9, 2)
    assert [placed.runs for placed in found.items] == [((0, 2),), ((3, 1),), ((4, 3),)]
    assert [placed.item for placed in found.items] == items


def test_modalities_are_counted_apart() -> None:
    items = [item(2), item(3, "video"), item(1)]
    found = expand([8, 1, 9, 9], items, BothProcessor())
    assert found.token_ids == (8, 8, 8, 1, 9, 9, 9)
    assert [(placed.item, placed.runs) for placed in found.items] == [
        (items[1], ((0, 3),)),
        (items[0], ((4, 2),)),
        (items[2], ((6, 1),)),
    ]
    assert found.num_item_tokens == {"image": 3, "video": 3}


def test_no_items_and_no_placeholders() -> None:
    found = expand([1, 2, 3], [], FakeProcessor())
    assert found.token_ids == (1, 2, 3)
    assert found.items == ()
    assert found.num_item_tokens == {}


def test_a_prompt_in_full_length_is_kept() -> None:
    prompt = [1, *[9] * 576, 2]
    found = expand(prompt, [item(576)], FakeProcessor())
    assert found.token_ids == tuple(prompt)
    assert found.items[0].runs == ((1, 576),)
    two = expand([*[9] * 4, 1, *[9] * 6], [item(4), item(6)], FakeProcessor())
    assert [placed.runs for placed in two.items] == [((0, 4),), ((5, 6),)]


def test_full_and_short_placeholders_in_one_prompt() -> None:
    found = expand([9, 9, 9, 1, 9], [item(3), item(2)], FakeProcessor())
    assert found.token_ids == (9, 9, 9, 1, 9, 9)
    found = expand([9, 1, 9, 9], [item(3), item(2)], FakeProcessor())
    assert found.token_ids == (9, 9, 9, 1, 9, 9)


def test_as_many_placeholders_as_items_are_single_ones() -> None:
    """Two items of two tokens each: two placeholder tokens are two placeholders, not one in full."""
    found = expand([9, 9], [item(2), item(2)], FakeProcessor())
    assert found.token_ids == (9, 9, 9, 9)


def test_runs_with_separators() -> None:
    found = expand([1, 9, 2], [item(4)], FramedProcessor())
    assert found.token_ids == (1, 5, 9, 9, 7, 9, 9, 7, 6, 2)
    assert found.items[0].runs == ((2, 2), (5, 2))
    assert found.num_item_tokens == {"image": 4}
    again = expand(found.token_ids, [item(4)], FramedProcessor())
    assert again == found


def test_placeholders_of_several_tokens() -> None:
    found = expand([1, 5, 9, 6, 2], [item(3)], ThreeTokenProcessor())
    assert found.token_ids == (1, 5, 9, 9, 9, 6, 2)
    assert found.items[0].runs == ((2, 3),)
    assert expand(found.token_ids, [item(3)], ThreeTokenProcessor()) == found
    assert expand([5, 9, 6], [item(1)], ThreeTokenProcessor()).token_ids == (5, 9, 6)


@pytest.mark.parametrize(
    ("prompt", "sizes", "counts"),
    [
        ([1, 2], [3], ("0 image placeholders", "1 image item")),
        ([9, 1], [], ("1 image placeholder", "0 image items")),
        ([9, 9], [3], ("2 image placeholders", "1 image item")),
        ([9], [3, 4], ("1 image placeholder", "2 image items")),
        ([9] * 575, [576], ("575 image placeholders", "1 image item")),
        ([9] * 577, [576], ("2 image placeholders", "1 image item")),
    ],
)
def test_more_or_fewer_placeholders_than_items(prompt, sizes, counts) -> None:
    with pytest.raises(PlaceholderMismatchError) as caught:
        expand(prompt, [item(size) for size in sizes], FakeProcessor())
    for count in counts:
        assert count in caught.value.message
    assert caught.value.code == "placeholder_mismatch"


def test_ids_that_no_vocabulary_has_are_left_alone() -> None:
    prompt = [9, 2**40, -1, 0x10FFFF, 0xD800]
    assert expand(prompt, [item(2)], FakeProcessor()).token_ids == (9, 9, *prompt[1:])


class CountingProcessor(FakeProcessor):
    """A replacement that is hard to find: a long run of pads with another token at its end."""

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        num = features.num_embeds
        return Replacement((*(9,) * num, 7), ((0, num),))


def test_many_placeholders_take_linear_time() -> None:
    """With quadratic work each of these would take minutes, far beyond the suite's time limits."""
    num = 100_000
    items = [item(2)] * num
    found = expand([9, 1] * num, items, FakeProcessor())
    assert len(found.token_ids) == 3 * num
    assert found.items[-1].runs == ((3 * num - 3, 2),)
    with pytest.raises(PlaceholderMismatchError, match=f"{num} image placeholders"):
        expand([9] * num, [item(num // 2)], CountingProcessor())
    with pytest.raises(PlaceholderMismatchError):
        expand([9] * num, [item(1000)] * 1000, CountingProcessor())
    with pytest.raises(PlaceholderMismatchError):
        expand([5] * num, [item(2)] * 1000, ThreeTokenProcessor())


segments = st.lists(
    st.one_of(
        st.lists(st.integers(1, 4), max_size=4).map(lambda ids: ("text", ids)),
        st.integers(2, 5).map(lambda size: ("short", size)),
        st.integers(2, 5).map(lambda size: ("full", size)),
    ),
    max_size=8,
)


@given(segments)
def test_short_and_full_placeholders_give_the_same_prompt(parts) -> None:
    """Pads of neighbouring items are kept apart by a token, as their order would be unclear
    otherwise.
    """
    prompt: list[int] = []
    expected: list[int] = []
    sizes: list[int] = []
    for kind, value in parts:
        if kind == "text":
            prompt += value
            expected += value
            continue
        prompt += [5, *[9] * (1 if kind == "short" else value), 6]
        expected += [5, *[9] * value, 6]
        sizes.append(value)
    found = expand(prompt, [item(size) for size in sizes], ThreeTokenProcessor())
    assert list(found.token_ids) == expected
    positions = [p for placed in found.items for s, n in placed.runs for p in range(s, s + n)]
    assert positions == [p for p, token_id in enumerate(expected) if token_id == 9]
    assert found.num_item_tokens.get("image", 0) == sum(sizes)
