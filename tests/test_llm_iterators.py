"""Prompts that come from an iterator, and outputs that come as they finish."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensorium import LLM, PoolingParams, RequestOutput, SamplingParams
from sensorium.core.request import SequenceUpdate
from sensorium.errors import InvalidRequestError, MediaUndecodableError
from tests import checkpoints
from tests.parts import Parts, build_llm

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
NUM_SEQS = 4
ROOM = {"num_kv_blocks": 400, "block_size": 16, "max_model_len": 256, "max_num_seqs": NUM_SEQS}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = checkpoints.make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))
    with build_llm(folder, **ROOM) as parts:
        yield parts


@pytest.fixture
def llm(parts: Parts) -> Iterator[LLM]:
    yield parts.llm
    parts.engine.check_integrity()
    stats = parts.llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.held_features) == (0, 0, 0)


def ids(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def texts(count: int) -> list[str]:
    return [f"number {i}" for i in range(count)]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_outputs_of_an_iterator_are_those_of_the_list(llm: LLM) -> None:
    prompts = texts(3 * NUM_SEQS)
    expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    outputs = llm.generate(iter(prompts), GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [ids(output) for output in outputs] == [ids(output) for output in expected]
    assert [output.index for output in outputs] == list(range(len(prompts)))
    assert llm.generate(iter([]), GREEDY, use_tqdm=False) == []


def test_what_gives_prompts_one_by_one_is_an_iterator(llm: LLM) -> None:
    """A data set, the keys of a mapping, a set; a mapping itself is one prompt."""

    class Lines:
        def __iter__(self) -> Iterator[str]:
            return iter(texts(2))

    for prompts in (Lines(), dict.fromkeys(texts(2)).keys()):
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.prompt for output in outputs] == texts(2)
    assert len(llm.generate({"prompt": "one"}, GREEDY, use_tqdm=False)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_only_so_many_prompts_are_read_ahead(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    num_read, num_finished, most = 0, 0, 0

    def endless() -> Iterator[str]:
        nonlocal num_read, most
        for number in range(20 * NUM_SEQS):
            num_read += 1
            most = max(most, num_read - num_finished)
            yield f"number {number}"

    def counted() -> list[SequenceUpdate]:
        nonlocal num_finished
        updates = step()
        num_finished += sum(update.finish_reason is not None for update in updates)
        return updates

    step = parts.engine.step
    monkeypatch.setattr(parts.engine, "step", counted)
    outputs = list(llm.generate(endless(), GREEDY, use_tqdm=False, stream=stream))  # type: ignore[call-overload]
    assert len(outputs) == num_read == 20 * NUM_SEQS
    assert NUM_SEQS <= most <= 2 * NUM_SEQS


def test_an_endless_iterator_is_left_when_enough_is_there(llm: LLM) -> None:
    numbers = itertools.count()
    stream = llm.generate((f"number {i}" for i in numbers), GREEDY, use_tqdm=False, stream=True)
    outputs = list(itertools.islice(stream, 10))
    stream.close()
    assert sorted(output.index or 0 for output in outputs) == list(range(10))
    assert next(numbers) <= 10 + 2 * NUM_SEQS


@pytest.mark.parametrize("kind", [list, iter])
def test_outputs_come_as_they_finish(llm: LLM, kind: Callable[[list[str]], Any]) -> None:
    params = [GREEDY.replace(max_tokens=n) for n in (150, 50, 100, 1)]
    expected = llm.generate(texts(4), params, use_tqdm=False)
    outputs = list(llm.generate(kind(texts(4)), kind(params), use_tqdm=False, stream=True))  # type: ignore[arg-type]
    assert [output.index for output in outputs] == [3, 1, 2, 0]
    assert all(output.finished for output in outputs)
    assert [ids(o) for o in sorted(outputs, key=lambda o: o.index or 0)] == [
        ids(output) for output in expected
    ]


def test_conversations_of_an_iterator(llm: LLM) -> None:
    conversations = [said(text) for text in texts(3)]
    expected = [ids(output) for output in llm.chat(conversations, GREEDY, use_tqdm=False)]
    given = (conversation for conversation in conversations)
    assert [ids(o) for o in llm.chat(given, GREEDY, use_tqdm=False)] == expected
    streamed = list(llm.chat(iter(conversations), GREEDY, use_tqdm=False, stream=True))
    assert [ids(o) for o in sorted(streamed, key=lambda o: o.index or 0)] == expected
    [alone] = llm.chat(said("number 0"), GREEDY, use_tqdm=False, stream=True)
    assert (alone.index, ids(alone)) == (0, expected[0])


def test_vectors_of_an_iterator(tmp_path: Path) -> None:
    folder = checkpoints.make_embedder("llama", tmp_path)
    with LLM(str(folder), **ROOM) as llm:
        vectors = [o.outputs.embedding for o in llm.embed(texts(3), use_tqdm=False)]
        read = llm.embed(iter(texts(3)), use_tqdm=False)
        assert [o.outputs.embedding for o in read] == vectors
        streamed = sorted(
            llm.embed(iter(texts(3)), use_tqdm=False, stream=True), key=lambda o: o.index or 0
        )
        assert [o.outputs.embedding for o in streamed] == vectors
        tensors = llm.encode(iter(texts(3)), PoolingParams(), use_tqdm=False)
        assert np.allclose([o.outputs.data.numpy() for o in tensors], vectors)


BROKEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


@pytest.mark.parametrize("wrong", ["long " * 500, [BROKEN]], ids=["too long", "no picture"])
def test_an_error_comes_after_what_was_before_it(llm: LLM, wrong: Any) -> None:
    contents = [*texts(6), wrong, *texts(50)]
    outputs, kinds = [], (InvalidRequestError, MediaUndecodableError, ValueError)
    read = iter([said(content) for content in contents])
    with pytest.raises(kinds, match=r"^Prompt 6: ") as caught:
        for output in llm.chat(read, GREEDY, use_tqdm=False, stream=True):
            outputs.append(output.index)  # noqa: PERF401 - the list is wanted when it fails
    assert set(range(6)) <= set(outputs)
    assert 6 not in outputs
    assert caught.value.index == 6  # type: ignore[attr-defined]
    assert len(list(read)) >= 50 - 2 * NUM_SEQS, "no more were read than were under way"


def test_an_error_without_streaming_has_the_outputs(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"^Prompt 3: ") as caught:
        llm.generate(iter([*texts(3), 5.0]), GREEDY, use_tqdm=False)
    assert caught.value.outputs is not None
    assert [output.prompt for output in caught.value.outputs] == texts(3)


def test_an_error_of_the_iterator_comes_out_as_it_is(llm: LLM) -> None:
    def lines() -> Iterator[str]:
        yield from texts(6)
        raise OSError("the disk has gone")

    outputs = []
    with pytest.raises(OSError, match="the disk has gone"):
        for output in llm.generate(lines(), GREEDY, use_tqdm=False, stream=True):
            outputs.append(output.index)  # noqa: PERF401 - the list is wanted when it fails
    assert sorted(outputs) == list(range(6))


def test_values_for_each_prompt_may_be_an_iterator_too(llm: LLM) -> None:
    params = (GREEDY.replace(max_tokens=1 + i % 3) for i in itertools.count())
    outputs = llm.generate(iter(texts(6)), params, use_tqdm=False)
    assert [len(ids(output)) for output in outputs] == [1, 2, 3, 1, 2, 3]
    with pytest.raises(InvalidRequestError, match=r"Prompt 2: There are more prompts .* are 2"):
        llm.generate(iter(texts(6)), [GREEDY] * 2, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match=r"Prompt 1: sampling_params\[1\] must be"):
        llm.generate(iter(texts(6)), [GREEDY, "hot"], use_tqdm=False)  # type: ignore[list-item]
    steps = llm.stats().num_steps
    with pytest.raises(InvalidRequestError, match="sampling_params must be a SamplingParams"):
        llm.generate(iter(texts(6)), 5, use_tqdm=False)  # type: ignore[arg-type]
    unusable = GREEDY.replace(structured_outputs={"regex": "("})
    with pytest.raises(InvalidRequestError, match="regex"):
        llm.generate(iter(texts(6)), unusable, use_tqdm=False)
    assert llm.stats().num_steps == steps, "what is wrong for all is found before anything runs"


def test_a_stream_is_one_call(llm: LLM) -> None:
    stream = llm.generate(iter(texts(9)), GREEDY, use_tqdm=False, stream=True)
    next(stream)
    with pytest.raises(InvalidRequestError, match="middle of another call"):
        llm.generate("other", GREEDY, use_tqdm=False)
    stream.close()
    assert len(llm.generate("other", GREEDY, use_tqdm=False)) == 1


@pytest.mark.parametrize("stream", ["generate", "chat_stream"])
def test_a_stream_of_an_llm_that_was_closed_says_so(tmp_path: Path, stream: str) -> None:
    checkpoints.make_qwen2_vl(tmp_path)
    with LLM(str(tmp_path), num_kv_blocks=64, max_num_seqs=NUM_SEQS) as llm:
        outputs: Iterator[RequestOutput] = (
            llm.generate(iter(texts(100)), GREEDY, use_tqdm=False, stream=True)
            if stream == "generate"
            else llm.chat_stream(said("hello"), GREEDY)
        )
        next(outputs)
    with pytest.raises(InvalidRequestError, match="This LLM has been closed"):
        next(outputs)
    assert list(outputs) == []
