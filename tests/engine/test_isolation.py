"""A fault in one sequence or item of a step fails that request alone.

The others get the tokens that they get alone.

The engine is a real one on a tiny checkpoint; faults are put into the model, the encoder, the
grammar, the pooler and the way from tokens to text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium import PoolingParams, SamplingParams
from sensorium.core.plan import TOO_COMPLEX, UNUSABLE
from sensorium.core.request import EngineRequest, SequenceUpdate, TokenSample
from sensorium.engine.outputs.pooling import pooling_request
from sensorium.engine.prompts.types import RawPrompt
from sensorium.models.interface import Model
from sensorium.multimodal.items import Features
from sensorium.runtime import pooler, sampler
from sensorium.runtime.runner import FAILED
from tests import checkpoints
from tests.engine.serving.test_frontend import new_frontend
from tests.parts import Parts, build_llm

VISION = "<|vision_start|><|image_pad|><|vision_end|>"
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ROOM = {"num_kv_blocks": 400, "block_size": 16, "max_model_len": 512, "max_num_seqs": 8}
BAD = 2
"""The request that a fault is put into, of those of ``prompts``."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def module_parts(folder: Path) -> Iterator[Parts]:
    with build_llm(folder, **ROOM) as parts:
        yield parts


@pytest.fixture
def parts(module_parts: Parts) -> Iterator[Parts]:
    yield module_parts
    module_parts.engine.check_integrity()
    stats = module_parts.llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.held_features) == (0, 0, 0)


@pytest.fixture(scope="module")
def vectors(folder: Path) -> Iterator[Parts]:
    with build_llm(folder, runner="pooling", **ROOM) as parts:
        yield parts


def seen(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    return {"prompt": f"{VISION}what", "multi_modal_data": {"image": pixels}}


def prompts(first: int) -> list[Any]:
    """Five requests: text and pictures that no earlier test has shown, so that nothing is cached."""
    return [f"words {first}", seen(first), seen(first + 1), f"more words {first}", seen(first + 2)]


def submit(parts: Parts, number: int, prompt: Any, params: Any) -> EngineRequest:
    """Give a prompt to the engine, without the way back."""
    input_processor = parts.processor
    prepared = parts.prepare(prompt)
    if isinstance(params, PoolingParams):
        wanted = input_processor.resolve_pooling(params)
        request = pooling_request(prepared, wanted, str(number), 0, 0.0)
    else:
        grammar = parts.run(input_processor.grammar(params))
        [request] = input_processor.requests(prepared, params, str(number), 0, 0.0, grammar)
    parts.engine.add(request, tuple(item.features for item in prepared.items))
    return request


def run(parts: Parts) -> dict[str, list[SequenceUpdate]]:
    updates: dict[str, list[SequenceUpdate]] = {}
    while parts.engine.has_work:
        for update in parts.engine.step():
            updates.setdefault(update.request_id, []).append(update)
    return updates


def tokens(updates: Sequence[SequenceUpdate]) -> list[int]:
    return [update.sample.token_id for update in updates if update.sample is not None]


def alone(parts: Parts, wanted: list[Any], params: Any) -> list[Any]:
    """What each request gets by itself: tokens, or a vector."""
    found: list[Any] = []
    for number, prompt in enumerate(wanted):
        submit(parts, number, prompt, params[number])
        updates = run(parts)[str(number)]
        found.append(updates[-1].embedding or tokens(updates))
    parts.engine.reset()  # nothing of it is cached
    return found


def together(parts: Parts, wanted: list[Any], params: Any) -> dict[str, list[SequenceUpdate]]:
    for number, prompt in enumerate(wanted):
        submit(parts, number, prompt, params[number])
    return run(parts)


def check(
    parts: Parts,
    first: int,
    break_it: Callable[[], Any],
    params: Sequence[Any] = (GREEDY,) * 5,
    wanted: list[Any] | None = None,
) -> str:
    """Run five requests with a fault in one; the message that this one fails with."""
    wanted = wanted or prompts(first)
    expected = alone(parts, wanted, params)
    break_it()
    updates = together(parts, wanted, params)
    for number in range(5):
        last = updates[str(number)][-1]
        if number == BAD:
            assert last.finish_reason == "error"
            assert last.error is not None
            message = last.error
        else:
            assert last.error is None
            assert (last.embedding or tokens(updates[str(number)])) == expected[number], number
    return message


@pytest.mark.parametrize("how", ["raises", "wrong length", "no list"])
def test_an_item_that_cannot_be_encoded(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model = parts.runner.model
    encode = model.encode
    wanted = prompts(100)
    bad_pixels: list[np.ndarray] = []

    def failing(items: Sequence[Features]) -> Any:
        mine = [
            any(np.array_equal(a, b) for a in i.arrays.values() for b in bad_pixels) for i in items
        ]
        if not any(mine):
            return encode(items)
        if how == "raises":
            raise RuntimeError("0x7f00 in /secret/path")
        if how == "no list":
            return None
        return [
            embeds[: -1 if own else None] for own, embeds in zip(mine, encode(items), strict=True)
        ]

    def break_it() -> None:
        prepared = parts.prepare(wanted[BAD])
        bad_pixels.extend(prepared.items[0].features.arrays.values())
        monkeypatch.setattr(model, "encode", failing)

    message = check(parts, 100, break_it, wanted=wanted)
    assert message == "Item 0 (image) could not be encoded."


def test_features_that_are_gone(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    store = parts.store
    get = store.get

    def losing(request_id: str, index: int) -> Features:
        if request_id == str(BAD):
            raise OSError("the segment has gone")
        return get(request_id, index)

    def break_it() -> None:
        monkeypatch.setattr(store, "get", losing)

    assert check(parts, 200, break_it) == "Item 0 (image) could not be encoded."


@pytest.mark.parametrize("at_step", [0, 1, 3])
def test_a_sequence_that_breaks_the_forward_pass(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    """As the whole step fails with it, the others are run again.

    With the same keys at the same places.
    """
    runner = parts.runner
    embed: Callable[[Any, Any], Any] = runner._run
    num_seen = 0

    def failing(pairs: Any, result: Any) -> None:
        nonlocal num_seen
        guilty = any(slot.request.request_id == str(BAD) for _, slot in pairs)
        if guilty and num_seen >= at_step:
            raise RuntimeError("a kernel failed")
        num_seen += guilty
        embed(pairs, result)

    def break_it() -> None:
        monkeypatch.setattr(runner, "_run", failing)

    assert check(parts, 300 + 10 * at_step, break_it) == FAILED


def test_a_sequence_whose_numbers_are_none(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = parts.runner
    sample = runner._sample

    def undefined(hidden: torch.Tensor, inputs: Any, result: Any) -> None:
        for row, slot in zip(inputs.sampled_rows, inputs.sampled_slots, strict=True):
            if slot.request.request_id == str(BAD):
                hidden[row] = torch.nan
        sample(hidden, inputs, result)

    def break_it() -> None:
        monkeypatch.setattr(runner, "_sample", undefined)

    for first, params in ((400, GREEDY), (410, GREEDY.replace(temperature=1.0, seed=4))):
        assert check(parts, first, break_it, [params] * 5).startswith(UNUSABLE)
        monkeypatch.undo()


def test_a_sampler_that_fails_for_one(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the others have been drawn when it fails, and are drawn again.

    To the same tokens.
    """
    process = sampler._process

    def failing(row: torch.Tensor, slot: Any) -> None:
        if slot.request.request_id == str(BAD) and slot.num_generated == 2:
            raise RuntimeError("an index is out of range")
        process(row, slot)

    def break_it() -> None:
        monkeypatch.setattr(sampler, "_process", failing)

    params = GREEDY.replace(temperature=0.8, seed=3, repetition_penalty=1.3, logprobs=2)
    assert check(parts, 500, break_it, [params] * 5) == FAILED


@pytest.mark.parametrize("how", ["refuses", "raises", "stuck", "cannot start"])
def test_a_grammar_that_fails(parts: Parts, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Beside others that follow grammars of their own, of which each may take a token once only."""
    from sensorium.text.grammar.grammar import Budget, GrammarMatcher

    constrained = [
        GREEDY.replace(structured_outputs={"regex": f"[a-z]{{3}}{number}[0-9]{{4}}"})
        for number in range(5)
    ]
    accept, fresh = GrammarMatcher.accept, GrammarMatcher.fresh
    slots = parts.runner._table.slots

    def mine(matcher: GrammarMatcher) -> bool:
        return any(
            slot.grammar is matcher and slot.request.request_id == str(BAD)
            for slot in slots.values()
        )

    def failing(matcher: GrammarMatcher, token_id: int) -> bool:
        if mine(matcher):
            if how == "raises":
                raise RuntimeError("a bug of the library")
            if how == "refuses":
                return False
            matcher._budget.take(1000.0)
        return accept(matcher, token_id)

    def unready(matcher: GrammarMatcher) -> GrammarMatcher:
        [owner] = [s for s in slots.values() if s.request.grammar is matcher]
        if owner.request.request_id == str(BAD):
            raise RuntimeError("a bug of the library")
        return fresh(matcher)

    def break_it() -> None:
        if how == "cannot start":
            monkeypatch.setattr(GrammarMatcher, "fresh", unready_of_slots)
        else:
            monkeypatch.setattr(GrammarMatcher, "accept", failing)

    def unready_of_slots(matcher: GrammarMatcher, *budget: Budget) -> GrammarMatcher:
        if any(slot.request.grammar is matcher for slot in slots.values()):
            return unready(matcher)
        return fresh(matcher, *budget)  # the engine's own copy for a request

    message = check(parts, 600, break_it, constrained)
    assert message == (
        "The grammar of structured_outputs could not be started."
        if how == "cannot start"
        else TOO_COMPLEX
    )


def test_an_embedding_that_cannot_be_made(vectors: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pooler.pool

    def failing(hidden: torch.Tensor, slots: Any) -> Any:
        if any(slot.request.request_id == str(BAD) for slot in slots):
            raise RuntimeError("no vector")
        return pool(hidden, slots)

    def break_it() -> None:
        monkeypatch.setattr(pooler, "pool", failing)

    assert check(vectors, 700, break_it, [PoolingParams()] * 5) == FAILED


def test_a_vector_that_is_not_finite(vectors: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pooler.pool

    def spoilt(hidden: torch.Tensor, slots: Any) -> Any:
        for row, slot in enumerate(slots):
            if slot.request.request_id == str(BAD):
                hidden[row, 0] = torch.inf
        return pool(hidden, slots)

    def break_it() -> None:
        monkeypatch.setattr(pooler, "pool", spoilt)

    assert check(vectors, 800, break_it, [PoolingParams()] * 5).startswith(UNUSABLE)


def test_a_model_that_fails_for_all_goes_on_afterwards(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = prompts(900)
    expected = alone(parts, wanted, [GREEDY] * 5)
    model: Model = parts.runner.model

    def failing(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", failing)
    updates = together(parts, wanted, [GREEDY] * 5)
    assert {updates[str(number)][-1].error for number in range(5)} == {FAILED}
    monkeypatch.undo()
    updates = together(parts, wanted, [GREEDY] * 5)
    assert [tokens(updates[str(number)]) for number in range(5)] == expected


def test_a_stream_that_fails_ends_its_request_alone(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frontend and detokenizer: the exception is the request's, its work in the engine ends, the
    next one is served.
    """
    from sensorium.text.detokenizer import Detokenizer

    expected = parts.llm.generate("next", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    append = Detokenizer.append

    def failing(self: Detokenizer, ids: Any) -> str:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Detokenizer, "append", failing)
    with pytest.raises(RuntimeError):
        parts.llm.generate("next", GREEDY, use_tqdm=False)
    monkeypatch.setattr(Detokenizer, "append", append)
    assert parts.llm.generate("next", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


async def test_a_stream_that_fails_when_serving_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is aborted in the engine, and the request beside it goes on to its end."""

    class Fragile:
        def __init__(self, *_: object, **__: object) -> None: ...

        def append(self, token_ids: list[int]) -> str:
            if 13 in token_ids:
                raise RuntimeError("a bug")
            return "x"

        def flush(self) -> str:
            return ""

    monkeypatch.setattr("sensorium.engine.outputs.stream.Detokenizer", Fragile)
    frontend, engine, _ = new_frontend()

    async def texts(name: str) -> list[str]:
        steps = frontend.generate(RawPrompt(text="a"), SamplingParams(), request_id=name)
        return [output.outputs[0].text async for output in steps]

    bad, good = (asyncio.create_task(texts(name)) for name in ("bad", "good"))
    while len(engine.output_queues) < 2:
        await asyncio.sleep(0)
    for name, token_ids in (("bad", (5, 13, 6)), ("good", (5, 13 + 1, 6))):
        output_queue = engine.output_queues[f"{name}#0"]
        for position, token_id in enumerate(token_ids):
            reason = "length" if position == 2 else None
            sample = TokenSample(token_id)
            output_queue.put_nowait(SequenceUpdate(f"{name}#0", sample, finish_reason=reason))
    with pytest.raises(RuntimeError, match="a bug"):
        await bad
    assert (await good)[-1] == "xxx"
    assert engine.aborted == ["bad#0"]
