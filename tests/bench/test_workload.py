from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from sensorium.bench.workload import RandomWorkload, data_url, random_image
from sensorium.errors import ConfigError


def test_texts_have_their_length_and_differ_from_the_first_word_on() -> None:
    workload = RandomWorkload(input_len=12, seed=1)
    texts = [workload.text(index).split() for index in range(20)]
    assert {len(text) for text in texts} == {12}
    assert len({tuple(text) for text in texts}) == 20
    assert len({text[0] for text in texts}) > 5


def test_the_seed_alone_decides() -> None:
    one, same = (RandomWorkload(input_len=12, seed=1, num_images=1) for _ in range(2))
    other = RandomWorkload(input_len=12, seed=2, num_images=1)
    assert one.content(3) == same.content(3)
    assert one.text(3) != other.text(3)
    assert one.content(3) != other.content(3)


def test_a_prefix_is_shared_and_the_rest_is_not() -> None:
    workload = RandomWorkload(input_len=10, prefix_len=6)
    first, second = workload.text(0).split(), workload.text(1).split()
    assert first[:6] == second[:6]
    assert first[6:] != second[6:]


def test_token_ids_are_cut_to_length_whatever_a_word_costs() -> None:
    workload = RandomWorkload(input_len=9)
    assert len(workload.token_ids(0, lambda text: [len(word) for word in text.split()])) == 9
    assert len(workload.token_ids(0, lambda text: [0] * (len(text.split()) // 4))) == 9


def test_images_come_as_data_urls_before_the_text() -> None:
    workload = RandomWorkload(input_len=5, num_images=2, image_size=(64, 48))
    content = workload.content(0)
    assert isinstance(content, list)
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    head, _, data = content[0]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 48)
    assert content[0] != content[1]


def test_images_are_drawn_from_as_many_as_asked_for() -> None:
    sizes = {"input_len": 4, "num_images": 2, "image_size": (32, 32)}
    limited = RandomWorkload(**sizes, distinct_images=3)
    unlimited = RandomWorkload(**sizes)

    def num_distinct(workload: RandomWorkload) -> int:
        return len({data_url(p) for index in range(5) for p in workload.images(index)})

    assert num_distinct(limited) == 3
    assert num_distinct(unlimited) == 10


def test_a_picture_smaller_than_a_cell() -> None:
    assert random_image("seed", 1, 3).size == (1, 3)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_len": 0}, "input_len"),
        ({"prefix_len": 8}, "prefix_len"),
        ({"prefix_len": -1}, "prefix_len"),
        ({"num_images": -1}, "num_images"),
        ({"distinct_images": -1}, "distinct_images"),
        ({"image_size": (0, 10)}, "image_size"),
        ({"image_size": (10, 100_000)}, "image_size"),
    ],
)
def test_wrong_values_name_their_flag(changes: dict[str, object], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RandomWorkload(**{"input_len": 8, **changes})
    assert caught.value.param == param
