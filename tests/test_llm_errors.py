"""An error in the middle of a batch: whose it is, what is done by then, and that the LLM goes on."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.core.plan import StepPlan, StepResult
from sensorium.errors import (
    InvalidRequestError,
    MediaUndecodableError,
    SensoriumError,
    UnavailableError,
)
from tests import checkpoints
from tests.parts import Parts, build_patient

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ROOM = {"num_kv_blocks": 400, "block_size": 16, "max_model_len": 512, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = checkpoints.make_qwen2_vl(tmp_path_factory.mktemp("qwen"))
    with build_patient(folder, **ROOM) as parts:
        yield parts


@pytest.fixture
def llm(parts: Parts) -> Iterator[LLM]:
    llm = parts.llm
    before = tokens(llm, [said("alone")])
    yield llm
    parts.engine.check_integrity()
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.held_features) == (0, 0, 0)
    assert tokens(llm, [said("alone")]) == before


def said(words: str, data: bytes | None = None) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": words}]
    if data is not None:
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tokens(llm: LLM, conversations: list[Any]) -> list[list[int]]:
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def failed(llm: LLM, conversations: list[Any], params: Any = GREEDY) -> SensoriumError:
    with pytest.raises(SensoriumError) as caught:
        llm.chat(conversations, params, use_tqdm=False)
    return caught.value


@pytest.mark.parametrize("bad", [0, 3, 9, 19])
def test_what_was_started_before_a_broken_image_is_not_lost(llm: LLM, bad: int) -> None:
    """All answers before the bad prompt are there, whatever the order in which they were computed."""
    conversations = [said(f"number {i}", png(i) if i % 2 else None) for i in range(20)]
    expected = tokens(llm, conversations)
    conversations[bad] = said("broken", png(bad)[:70])
    error = failed(llm, conversations)
    assert isinstance(error, MediaUndecodableError)
    assert error.index == bad
    assert error.message.startswith(f"Prompt {bad}: ")
    assert error.outputs is not None
    assert len(error.outputs) == 20
    assert error.outputs[bad] is None
    assert [output.outputs[0].token_ids for output in error.outputs[:bad]] == expected[:bad]
    for output, known in zip(error.outputs[bad:], expected[bad:], strict=True):
        assert output is None or (output.finished and output.outputs[0].token_ids == known)
    left = [i for i, output in enumerate(error.outputs) if output is None and i != bad]
    if left:
        assert tokens(llm, [conversations[i] for i in left]) == [expected[i] for i in left]


def test_two_broken_pictures_raise_the_first(llm: LLM) -> None:
    conversations = [said("a"), said("b", png(1)[:70]), said("c", png(2)[:70]), said("d")]
    error = failed(llm, conversations)
    assert error.index == 1
    assert error.outputs is not None
    assert error.outputs[0] is not None


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_sequence_that_fails_in_the_engine_harms_no_other(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch, num_samples: int
) -> None:
    """News of the others in the same step, and their later ones, are not lost with it."""
    conversations = [said(f"number {i}") for i in range(8)]
    expected = tokens(llm, conversations)
    params = [GREEDY.replace(n=num_samples if i == 2 else 1) for i in range(8)]
    runner, num_steps, third = parts.runner, 0, list[int]()
    execute, decode = runner.execute, llm.get_tokenizer().decode

    def failing(plan: StepPlan) -> StepResult:
        nonlocal num_steps
        result = execute(plan)
        num_steps += 1
        third.extend(new.seq_id for new in plan.new if "number 2" in decode(new.token_ids))
        if num_steps == 3 and third:
            result.samples.pop(third[0], None)
            result.failed[third[0]] = "It was told to fail."
        return result

    monkeypatch.setattr(runner, "execute", failing)
    error = failed(llm, conversations, params)
    monkeypatch.undo()
    assert isinstance(error, UnavailableError)
    assert error.index == 2
    assert error.outputs is not None
    done = [i for i, output in enumerate(error.outputs) if output is not None]
    assert {0, 1, 3} <= set(done), "they were running beside it"
    assert 2 not in done
    assert [error.outputs[i].outputs[0].token_ids for i in done] == [expected[i] for i in done]


def test_a_request_that_the_engine_does_not_take_leaves_nothing(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, num_added = parts.engine.add, 0

    def refusing(*arguments: Any) -> None:
        nonlocal num_added
        num_added += 1
        if num_added == 4:  # the second sample of the third prompt
            raise InvalidRequestError("not this one")
        add(*arguments)

    monkeypatch.setattr(parts.engine, "add", refusing)
    params = [GREEDY.replace(n=n) for n in (1, 1, 3, 1)]
    error = failed(llm, [said(word) for word in "abcd"], params)
    monkeypatch.undo()
    assert error.index == 2
    assert error.outputs is not None
    assert [output is not None for output in error.outputs] == [True, True, False, False]


def test_one_prompt_alone_has_no_place(llm: LLM) -> None:
    error = failed(llm, said("broken", png(0)[:70]))
    assert error.index is None
    assert error.outputs == [None]
    stream = llm.chat_stream(said("broken", png(0)[:70]), GREEDY)
    with pytest.raises(MediaUndecodableError):
        next(stream)


def test_what_can_be_told_before_anything_runs_has_no_outputs(llm: LLM) -> None:
    steps = llm.stats().num_steps
    unusable = SamplingParams(structured_outputs={"regex": "("})  # type: ignore[arg-type]
    for params in (unusable, [GREEDY, unusable]):
        error = failed(llm, [said("a"), said("b")], params)
        assert error.param == "structured_outputs.regex"
        assert error.outputs is None
    error = failed(llm, [said("a"), [{"role": "no body", "content": "b"}]])
    assert (error.index, error.outputs) == (1, None)
    assert llm.stats().num_steps == steps


def test_vectors_come_in_the_form_that_was_asked_for(tmp_path: Path) -> None:
    folder = checkpoints.make_qwen2_vl(tmp_path)
    inputs: list[Any] = [
        {"messages": said("a")},
        {"messages": said("b", png(1))},
        {"messages": said("c", png(1)[:70])},
    ]
    with LLM(str(folder), runner="pooling", **ROOM) as llm:
        expected = llm.embed(inputs[:2], use_tqdm=False)
        with pytest.raises(MediaUndecodableError) as caught:
            llm.embed(inputs, use_tqdm=False)
        outputs = caught.value.outputs
        assert outputs is not None
        assert outputs[2] is None
        for output, known in zip(outputs, expected, strict=False):
            assert output.outputs.embedding == pytest.approx(known.outputs.embedding)
        with pytest.raises(MediaUndecodableError) as caught:
            llm.encode(inputs, use_tqdm=False)
        assert caught.value.outputs is not None
        assert caught.value.outputs[0].outputs.data.shape == (64,)
