"""Sampling: restrictions, penalties, filters, draws that depend on the seed alone, log
probabilities.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sensorium
from sensorium.core.plan import NewSequence
from sensorium.core.request import EngineRequest
from sensorium.params import SamplingParams, StructuredOutputs
from sensorium.runtime import sampler
from sensorium.runtime.slots import Slot
from sensorium.text.grammar.grammar import GrammarVocabulary, compile_grammar
from sensorium.text.tokenizer import Tokenizer


def slot(
    seq_id: int = 0,
    *,
    prompt: tuple[int, ...] = (1, 2),
    generated: tuple[int, ...] = (),
    bad_words: tuple[tuple[int, ...], ...] = (),
    eos: tuple[int, ...] = (),
    **params: Any,
) -> Slot:
    request = EngineRequest(
        request_id=str(seq_id),
        token_ids=prompt,
        params=SamplingParams(**{"temperature": 0.0, "max_tokens": 50, **params}),
        max_tokens=50,
        bad_words_token_ids=bad_words,
        eos_token_ids=eos,
    )
    return Slot.of(NewSequence(seq_id, request, prompt + generated))


def one(logits: list[float], row: Slot) -> int:
    samples, failed = sampler.sample(torch.tensor([logits]), [row])
    assert not failed
    return samples[row.seq_id].token_id


def draws(logits: list[float], num: int = 400, **params: Any) -> dict[int, float]:
    """Frequencies of tokens over many seeds."""
    rows = [slot(i, seed=i, **{"temperature": 1.0, **params}) for i in range(num)]
    samples, _ = sampler.sample(torch.tensor([logits] * num), rows)
    counts: dict[int, float] = {}
    for sample in samples.values():
        counts[sample.token_id] = counts.get(sample.token_id, 0) + 1 / num
    return counts


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert one([0.0, 3.0, 3.0, -1.0], slot()) == 1


def test_allowed_token_ids() -> None:
    assert one([5.0, 3.0, 4.0], slot(allowed_token_ids=[1, 2])) == 2


def test_logit_bias_and_minus_hundred_bans() -> None:
    assert one([5.0, 4.0, 0.0], slot(logit_bias={0: -100.0})) == 1
    assert one([5.0, 4.0, 0.0], slot(logit_bias={2: 50.0})) == 2


def test_bad_words_of_one_and_of_several_tokens() -> None:
    assert one([5.0, 4.0, 0.0], slot(bad_words=((0,),))) == 1
    words = ((3, 0),)
    assert one([5.0, 4.0, 0.0, 0.0], slot(bad_words=words, generated=(3,))) == 1
    assert one([5.0, 4.0, 0.0, 0.0], slot(bad_words=words, generated=(2,))) == 0
    # The words of the prompt do not count as a beginning.
    assert one([5.0, 4.0, 0.0, 0.0], slot(bad_words=words, prompt=(1, 3))) == 0


def test_min_tokens_bars_the_end_until_it_is_reached() -> None:
    early = slot(min_tokens=2, eos=(0,), stop_token_ids=[1])
    assert one([5.0, 4.0, 3.0], early) == 2
    late = slot(min_tokens=2, eos=(0,), stop_token_ids=[1], generated=(2, 2))
    assert one([5.0, 4.0, 3.0], late) == 0


def test_penalties() -> None:
    logits = [2.0, 1.9, -1.0]
    assert one(logits, slot(repetition_penalty=2.0, prompt=(0,))) == 1
    assert one(logits, slot(presence_penalty=0.5, prompt=(0,))) == 0, "presence is of the answer"
    assert one(logits, slot(presence_penalty=0.5, generated=(0,))) == 1
    assert one(logits, slot(frequency_penalty=0.04, generated=(0, 0))) == 0
    assert one(logits, slot(frequency_penalty=0.06, generated=(0, 0))) == 1


def test_draws_follow_the_distribution() -> None:
    probs = [0.5, 0.3, 0.2]
    found = draws([math.log(p) for p in probs], num=4000)
    for token, prob in enumerate(probs):
        assert found[token] == pytest.approx(prob, abs=0.04)


def test_temperature_sharpens() -> None:
    found = draws([1.0, 0.5, 0.0], temperature=0.05)
    assert found[0] > 0.99
    assert draws([1.0, 0.5, 0.0], temperature=1e-9) == {0: pytest.approx(1.0)}


def test_top_k_top_p_min_p() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(draws(logits, top_k=2)) == {0, 1}
    assert set(draws(logits, top_p=0.65)) == {0, 1}
    assert set(draws(logits, top_p=0.01)) == {0}
    assert set(draws(logits, min_p=0.6)) == {0, 1}
    # top-p is of what top-k leaves: 0.4/0.7 reaches 0.5 alone.
    assert set(draws(logits, top_k=2, top_p=0.5)) == {0}


def test_top_p_over_a_flat_vocabulary_needs_many_candidates() -> None:
    """More tokens are needed than are sorted at first."""
    num = 4 * sampler.FIRST_CANDIDATES
    rows = [slot(i, seed=i, temperature=1.0, top_p=0.5) for i in range(64)]
    logits = torch.zeros(64, num)
    logits[:, : num // 2] += 0.001
    samples, _ = sampler.sample(logits, rows)
    tokens = {sample.token_id for sample in samples.values()}
    assert max(tokens) < num // 2
    assert len(tokens) > 40


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 63),
    generated=st.integers(0, 4),
    others=st.lists(st.sampled_from(["greedy", "plain", "top_p", "top_k", "bias"]), max_size=5),
    place=st.integers(0, 5),
)
def test_a_seeded_row_does_not_see_its_neighbours(
    seed: int, generated: int, others: list[str], place: int
) -> None:
    generator = torch.Generator().manual_seed(seed % (1 << 31))
    logits = torch.randn(len(others) + 1, 64, generator=generator)
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "plain": {"temperature": 1.0, "seed": 1},
        "top_p": {"temperature": 0.7, "top_p": 0.9, "seed": 2},
        "top_k": {"temperature": 1.5, "top_k": 5, "seed": 3},
        "bias": {"temperature": 1.0, "logit_bias": {3: 4.0}, "seed": 4},
    }
    place = min(place, len(others))
    own = {"temperature": 1.0, "top_p": 0.8, "seed": seed, "generated": (1,) * generated}
    rows = [slot(i + 1, **kinds[kind]) for i, kind in enumerate(others)]
    rows.insert(place, slot(0, **own))
    alone, _ = sampler.sample(logits[place : place + 1].clone(), [slot(0, **own)])
    together, _ = sampler.sample(logits.clone(), rows)
    assert together[0].token_id == alone[0].token_id


NEIGHBOURS: dict[str, dict[str, Any]] = {
    "more log-probabilities": {"logprobs": 20},
    "a large top_k": {"temperature": 1.0, "top_k": 3000},
    "a flat distribution": {"temperature": 100.0, "top_p": 0.9},
    "greedy": {},
}
OWN: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 2},
    "top_p": {"temperature": 3.0, "top_p": 0.9, "logprobs": 3},
    "top_k": {"temperature": 3.0, "top_k": 40},
    "min_p": {"temperature": 3.0, "min_p": 0.01, "top_p": 0.7},
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_the_order_of_equally_likely_tokens_does_not_depend_on_neighbours(
    own: str, neighbour: str
) -> None:
    """Many of a row of 16-bit logits are equal.

    Which of them is drawn or reported must be the row's own affair.
    """
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(24, 40_000, generator=generator)).bfloat16().float()
    other = slot(99, seed=1, **NEIGHBOURS[neighbour])
    for seed in range(0, 24, 2):
        row, pair = slot(0, seed=seed, **OWN[own]), logits[seed : seed + 2]
        alone, _ = sampler.sample(pair[:1].clone(), [row])
        together, _ = sampler.sample(pair.clone(), [row, other])
        assert together[0] == alone[0]


@pytest.mark.parametrize("length", [1, 1000, 1024, 32_769, 151_936])
def test_sums_of_a_row_are_the_same_bits_alone(length: int) -> None:
    rows = torch.rand(5, length, generator=torch.Generator().manual_seed(2))
    together = sampler._sums(rows)
    torch.testing.assert_close(together, rows.sum(-1))
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            alone = [sampler._sums(rows[i : i + 1]) for i in range(5)]
        finally:
            torch.set_num_threads(before)
        assert torch.equal(torch.cat(alone), together)


def test_uniform_is_uniform_and_depends_on_both() -> None:
    values = [sampler.uniform(seed, pos) for seed in range(60) for pos in range(60)]
    assert all(0.0 < v < 1.0 for v in values)
    assert len(set(values)) == len(values)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.02)
    assert sum(v < 0.1 for v in values) / len(values) == pytest.approx(0.1, abs=0.02)


def test_logprobs_are_of_the_raw_distribution_with_ranks() -> None:
    row = slot(logprobs=2, logit_bias={2: 50.0})
    samples, _ = sampler.sample(torch.tensor([[2.0, 1.0, 0.0]]), [row])
    entries = samples[0].logprobs
    assert entries is not None
    expected = torch.log_softmax(torch.tensor([2.0, 1.0, 0.0]), -1)
    assert [(e[0], e[2]) for e in entries] == [(2, 3), (0, 1), (1, 2)]
    assert entries[0][1] == pytest.approx(expected[2].item())
    plain, _ = sampler.sample(torch.tensor([[2.0, 1.0, 0.0]]), [slot(logprobs=0)])
    assert plain[0].logprobs is not None
    assert [e[0] for e in plain[0].logprobs] == [0]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 1}])
def test_rows_without_a_usable_distribution_fail_alone(params: dict[str, Any]) -> None:
    good = slot(1)
    none_left = slot(2, allowed_token_ids=[0], bad_words=((0,),), **params)
    overflowed = slot(3, **params)
    logits = torch.tensor([[1.0, 2.0], [1.0, 2.0], [math.nan, 1.0]])
    samples, failed = sampler.sample(logits, [good, none_left, overflowed])
    assert samples[1].token_id == 1
    assert set(failed) == {2, 3}


DEMO = Path(sensorium.__file__).parent / "demo"


@pytest.mark.parametrize(
    ("wish", "params", "expected"),
    [
        (10.0, {}, '"'),
        (4.0, {}, "a"),
        (10.0, {"min_tokens": 3}, "a"),
        (10.0, {"allowed_token_ids": ["a"]}, "a"),
        (10.0, {"logit_bias": {'"': -100.0}}, "a"),
    ],
)
def test_who_wants_to_end_amid_json_closes_what_is_open(
    wish: float, params: dict[str, Any], expected: str
) -> None:
    tokenizer = Tokenizer.from_folder(DEMO)
    size = tokenizer.max_token_id + 1
    ids = {text: tokenizer.encode(text)[-1] for text in ("a", '"')}
    given: dict[str, Any] = dict(params)
    if "allowed_token_ids" in params:
        given["allowed_token_ids"] = [ids["a"]]
    if "logit_bias" in params:
        given["logit_bias"] = {ids['"']: -100.0}
    row = slot(eos=tokenizer.eos_token_ids, **given)
    grammar = compile_grammar(StructuredOutputs(json={"type": "string"}))
    row.grammar = GrammarVocabulary(tokenizer, size).matcher(grammar.text)
    assert row.grammar.accept(ids['"'])
    logits = torch.full((1, size), -5.0)
    logits[0, ids["a"]] = 5.0
    logits[0, list(tokenizer.eos_token_ids)] = wish
    samples, _ = sampler.sample(logits, [row])
    assert tokenizer.decode([samples[row.seq_id].token_id]) == expected
