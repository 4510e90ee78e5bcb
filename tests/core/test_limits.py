from __future__ import annotations

from typing import Any

import pytest

from sensorium.core.limits import SchedulerLimits
from sensorium.errors import ConfigError, MediaTooLargeError, PromptTooLongError
from tests.core.driver import media_prompt, request


def limits(**changes: Any) -> SchedulerLimits:
    given = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 32,
        "num_blocks": 5,
        "block_size": 4,
        "encode_budget": 6,
        "encoder_cache_size": 8,
    }
    return SchedulerLimits(**(given | changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("max_model_len", 1),
        ("num_blocks", 0),
        ("block_size", -1),
        ("encode_budget", -1),
        ("encoder_cache_size", -1),
        ("max_num_waiting", 0),
    ],
)
def test_senseless_limits_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least .*, got {value}"):
        limits(**{name: value})


def test_a_prompt_must_leave_room_to_generate() -> None:
    roomy = limits(num_blocks=100)
    roomy.check(request("r", 31))
    with pytest.raises(
        PromptTooLongError,
        match=r"length is 32 tokens\. However, the prompt has 32 tokens, and one",
    ):
        roomy.check(request("r", 32))


def test_a_prompt_must_fit_the_cache() -> None:
    limits().check(request("r", 20))
    with pytest.raises(
        PromptTooLongError,
        match=r"length is 20 tokens\. However, the prompt has 21 tokens, and",
    ):
        limits().check(request("r", 21))


def test_a_prompt_must_fit_one_step_when_it_cannot_be_split() -> None:
    limits().check(request("r", 17))
    with pytest.raises(
        PromptTooLongError, match=r"length is 16 tokens\. However, the prompt has 17 tokens, a step"
    ):
        limits(enable_chunked_prefill=False).check(request("r", 17))


@pytest.mark.parametrize("name", ["encode_budget", "encoder_cache_size"])
def test_an_item_must_fit_both_budgets(name: str) -> None:
    ids, items = media_prompt(("cat", 3), 1, ("dog", 4))
    limits(**{name: 4}).check(request("r", ids, items=items))
    with pytest.raises(MediaTooLargeError, match=r"Item 1 .*makes 4 embeddings.*of 3") as refused:
        limits(**{name: 3}).check(request("r", ids, items=items))
    assert refused.value.param == "items[1]"


def test_all_items_must_fit_when_the_prompt_cannot_be_split() -> None:
    ids, items = media_prompt(("cat", 3), 1, ("dog", 4), ("cat", 3))
    limits(encode_budget=4).check(request("r", ids, items=items))
    whole = limits(enable_chunked_prefill=False, encode_budget=7)
    whole.check(request("r", ids, items=items))
    with pytest.raises(MediaTooLargeError, match=r"make 7 embeddings, more than .* 6"):
        limits(enable_chunked_prefill=False).check(request("r", ids, items=items))
