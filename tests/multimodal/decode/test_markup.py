"""Placeholders that are no single tokens: found in text, put in as ids, numbered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import PlaceholderMismatchError
from sensorium.multimodal.items import MODALITIES, MediaItem
from sensorium.multimodal.placeholders import (
    NumberedPlaceholder,
    PlaceholderIds,
    expand,
    in_order,
    marker,
)
from sensorium.multimodal.processor import Markup
from tests.multimodal.support import FakeProcessor, item

NUMBERED = Markup({"image": r"<\|image_(?P<number>\d+)\|>"}, prefix_each=True)
PLAIN = Markup({"image": r"\(<image>\./</image>\)", "video": r"\(<video>\./</video>\)"})


class MarkedProcessor(FakeProcessor):
    modalities = ("image", "video")
    placeholders = {"image": (marker("image"),), "video": (marker("video"),)}  # noqa: RUF012


def ids_of(markup: Markup) -> PlaceholderIds:
    return PlaceholderIds(MarkedProcessor(), markup)


def placeholder(number: int | None) -> NumberedPlaceholder:
    return NumberedPlaceholder("image", (marker("image"),), number)


def items(num: int) -> list[MediaItem]:
    return [item(1 + index) for index in range(num)]


def test_markers_are_no_ids_of_any_vocabulary() -> None:
    found = {marker(modality) for modality in MODALITIES}
    assert len(found) == len(MODALITIES)
    assert min(found) > 1_000_000


def test_text_is_split_at_placeholders() -> None:
    stretches, found = ids_of(NUMBERED).split("a<|image_2|> b <|image_1|><|image_x|>")
    assert stretches == ["a", " b ", "<|image_x|>"]
    assert found == [placeholder(2), placeholder(1)]


def test_several_modalities_come_in_the_order_of_the_text() -> None:
    stretches, found = ids_of(PLAIN).split("(<video>./</video>)x(<image>./</image>)")
    assert stretches == ["", "x", ""]
    assert [p.modality for p in found] == ["video", "image"]
    assert {p.number for p in found} == {None}


@given(st.lists(st.sampled_from(["<|image_1|>", "<|image_12|>", "a", "<|", "image_3|>", "\n"])))
def test_the_pieces_make_up_the_text(parts: list[str]) -> None:
    text = "".join(parts)
    stretches, found = ids_of(NUMBERED).split(text)
    spelled = [f"<|image_{p.number}|>" for p in found]
    pairs = zip(stretches, [*spelled, ""], strict=True)
    assert "".join(a + b for a, b in pairs) == text


def test_no_more_are_looked_for_than_wanted() -> None:
    text = "a(<image>./</image>)(<video>./</video>)(<image>./</image>)b"
    stretches, found = ids_of(PLAIN).split(text, 2)
    assert stretches == ["a", "", "(<image>./</image>)b"]
    assert [p.modality for p in found] == ["image", "video"]
    assert len(ids_of(PLAIN).split(text, 3)[1]) == len(ids_of(PLAIN).split(text)[1]) == 3


def test_only_a_whole_text_is_a_placeholder() -> None:
    assert ids_of(NUMBERED).read("<|image_3|>") == placeholder(3)
    assert ids_of(PLAIN).read("(<image>./</image>)") == placeholder(None)
    assert ids_of(NUMBERED).read("<|image_3|> ") is None
    assert ids_of(NUMBERED).prefix_each
    assert not ids_of(PLAIN).prefix_each


def test_numbers_decide_which_item_stands_where() -> None:
    one, two = items(2)
    assert in_order(
        [one, two], [placeholder(2), placeholder(1), placeholder(2)], FakeProcessor()
    ) == [two, one, two]


def test_items_without_numbers_keep_their_order() -> None:
    film, one, two = item(5, "video"), *items(2)
    assert in_order([film, one, two], [placeholder(2), placeholder(1)], FakeProcessor()) == [
        two,
        one,
        film,
    ]
    assert in_order([one, two], [placeholder(None)] * 2, FakeProcessor()) == [one, two]


@pytest.mark.parametrize("numbers", [[1], [1, 3], [1, 2, 3], [0, 1, 2]])
def test_every_item_is_named_and_no_other(numbers: list[int]) -> None:
    with pytest.raises(PlaceholderMismatchError, match="there are 2 image items: name each of 1"):
        in_order(items(2), [placeholder(number) for number in numbers], FakeProcessor())


def test_numbers_that_no_item_has() -> None:
    assert ids_of(NUMBERED).split("<|image_000000001|>")[1] == [placeholder(1)]
    with pytest.raises(PlaceholderMismatchError, match="123456789…, a number of 5000 digits"):
        ids_of(NUMBERED).split(f"<|image_{'1234567890' * 500}|>")
    many = [placeholder(number) for number in range(1, 1000)]
    with pytest.raises(PlaceholderMismatchError, match="the items 1, 2, 3, 4, 5, 6, 7, 8 …, but"):
        in_order(items(2), many, FakeProcessor())


def test_an_item_of_two_placeholders_is_expanded_twice() -> None:
    mark = marker("image")
    ordered = in_order(items(2), [placeholder(p) for p in (2, 1, 2)], FakeProcessor())
    found = expand((mark, 7, mark, mark), ordered, MarkedProcessor())
    assert [length for placed in found.items for _, length in placed.runs] == [2, 1, 2]
