"""Calls of the offline API that end badly or overlap.

What is left of them must not harm the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.core.plan import StepPlan, StepResult
from sensorium.core.request import EngineRequest
from sensorium.engine import wire
from sensorium.engine.grammar.compiler import ENTRY_CHARS
from sensorium.engine.prompts.lengths import LONG_TEXT
from sensorium.engine.prompts.types import PreparedPrompt, Prompt, RawPrompt
from sensorium.errors import InvalidRequestError, PromptTooLongError, UnavailableError
from sensorium.text.chat.chat_template import RenderedPrompt
from tests import checkpoints
from tests.parts import Parts, build_llm

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    checkpoints.make_qwen2_vl(folder)
    room = {"num_kv_blocks": 400, "block_size": 16, "max_model_len": 512, "max_num_seqs": 4}
    with build_llm(folder, **room) as parts:
        yield parts


@pytest.fixture
def llm(parts: Parts) -> Iterator[LLM]:
    yield parts.llm
    parts.engine.check_integrity()
    stats = parts.llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.held_features) == (0, 0, 0)


def seen(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return {"prompt": f"{VISION}what", "multi_modal_data": {"image": image}}


def answers(llm: LLM, prompts: list[Any]) -> list[list[int]]:
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("after", [False, True], ids=["before the step", "after the step"])
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_an_interrupt_in_a_step_leaves_an_llm_that_works(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch, num_steps: int, after: bool
) -> None:
    runner, steps = parts.runner, []
    execute = runner.execute

    def interrupted(plan: StepPlan) -> StepResult:
        steps.append(plan)
        if len(steps) <= num_steps:
            return execute(plan)
        if after:
            execute(plan)
        raise KeyboardInterrupt

    prompts = [seen(1), "words", seen(2)]
    expected = answers(llm, prompts)
    monkeypatch.setattr(runner, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(llm, [seen(3), *prompts, seen(4)])
    monkeypatch.undo()
    parts.engine.check_integrity()
    assert answers(llm, prompts) == expected


@pytest.mark.parametrize("where", ["abort", "reset"])
def test_an_interrupt_while_cleaning_up_leaves_an_llm_that_works(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = answers(llm, ["one", "two"])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts.engine, where, interrupted)
    if where == "reset":
        monkeypatch.setattr(parts.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answers(llm, ["three"])
    else:
        stream = llm.chat_stream([{"role": "user", "content": "hi"}], GREEDY)
        next(stream)
        with pytest.raises(KeyboardInterrupt):
            stream.close()
    monkeypatch.undo()
    assert answers(llm, ["one", "two"]) == expected


def test_samples_of_a_long_prompt_are_bounded_together(llm: LLM, parts: Parts) -> None:
    """Each brings the whole prompt to the engine: a short request must not be hours of work."""
    most = llm.config.scheduler.max_sampled_prompt_tokens
    prepared = PreparedPrompt("", (1,) * (most // 10_000))

    def requests(n: int) -> list[EngineRequest]:
        return parts.processor.requests(prepared, SamplingParams(n=n), "id", 0, 0.0)

    most_samples = most // len(prepared.token_ids)
    assert len(requests(most_samples)) == most_samples
    with pytest.raises(InvalidRequestError, match="fewer samples") as caught:
        requests(most_samples + 1)
    assert caught.value.param == "n"


def test_a_wrong_constraint_names_its_prompt(llm: LLM) -> None:
    params = [GREEDY] * 2 + [GREEDY.replace(structured_outputs={"regex": "("})] * 2
    with pytest.raises(InvalidRequestError, match=r"^Prompt 2: .*regex") as caught:
        llm.generate(["a", "b", "c", "d"], params, use_tqdm=False)
    assert caught.value.index == 2
    assert caught.value.param == "structured_outputs.regex"
    with pytest.raises(InvalidRequestError, match=r"^structured_outputs\.regex"):
        llm.generate(["a", "b"], params[2], use_tqdm=False)


def test_more_constraints_than_may_wait_at_a_time(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensorium.engine.grammar.compiler.KEPT_CHARS", 4 * ENTRY_CHARS)
    monkeypatch.setattr("sensorium.engine.offline.batch.COMPILED_AT_ONCE", 2)
    params = [
        GREEDY.replace(max_tokens=1, structured_outputs={"regex": f"[a-z]{{{number}}}"})
        for number in range(2, 9)
    ]
    params.append(GREEDY.replace(structured_outputs={"regex": "("}))
    with pytest.raises(InvalidRequestError, match=r"^Prompt 7: .*regex"):
        llm.generate(["a"] * len(params), params, use_tqdm=False)


def test_an_error_outside_the_engine_ends_the_work(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(llm, ["one", "two"])

    def broken(*_: object) -> None:
        raise OSError("the terminal has gone")

    monkeypatch.setattr("sensorium.engine.offline.progress.Progress.done", broken)
    params = [GREEDY.replace(max_tokens=2), GREEDY.replace(max_tokens=300)]
    with pytest.raises(OSError, match="terminal") as caught:
        llm.generate(["three", "four"], params, use_tqdm=False)
    monkeypatch.undo()
    assert answers(llm, ["one", "two"]) == expected
    del caught  # held the frames, and with them a generator that nobody closed, until here


def test_a_call_in_the_middle_of_another_is_refused(llm: LLM) -> None:
    stream = llm.chat_stream([{"role": "user", "content": "hi"}], GREEDY.replace(max_tokens=300))
    next(stream)
    with pytest.raises(InvalidRequestError, match="middle of another call"):
        llm.generate("other", GREEDY, use_tqdm=False)
    assert len(next(stream).outputs[0].token_ids) == 2
    stream.close()
    assert len(answers(llm, ["other"])[0]) == 8


def test_only_so_many_prompts_are_held_at_a_time(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, held = 2 * llm.config.scheduler.max_num_seqs, []
    complete = parts.processor.complete

    async def counted(prompt: Prompt, rendered: RenderedPrompt) -> PreparedPrompt:
        stats = parts.engine.stats()
        held.append(stats.num_running + stats.num_waiting)
        return await complete(prompt, rendered)

    monkeypatch.setattr(parts.processor, "complete", counted)
    prompts = [[5 + i % 7] for i in range(3 * most)]
    outputs = llm.generate(prompts, GREEDY.replace(max_tokens=30), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert max(held) <= most


def test_what_is_wrong_without_its_media_is_found_before_anything_runs(llm: LLM) -> None:
    before = llm.stats().num_steps
    for wrong, match in (
        ("long " * 1000, "512"),
        (f"{VISION}what", "placeholder"),
        ({"prompt_token_ids": [5, 10**6]}, "vocabulary"),
    ):
        with pytest.raises(ValueError, match=rf"Prompt 2.*{match}"):
            llm.generate(["a", seen(1), wrong], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        llm.generate(["a", "b"], [GREEDY, GREEDY.replace(stop_token_ids=[10**6])], use_tqdm=False)
    assert llm.stats().num_steps == before


def test_errors_name_the_prompt_even_when_it_is_the_last_one_left(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = parts.processor.complete
    before = llm.stats().num_steps

    async def late(prompt: Prompt, rendered: RenderedPrompt) -> PreparedPrompt:
        if rendered.refs:
            while parts.engine.has_work or llm.stats().num_steps == before:
                await asyncio.sleep(0.001)
            raise UnavailableError("lost")
        return await complete(prompt, rendered)

    monkeypatch.setattr(parts.processor, "complete", late)
    with pytest.raises(UnavailableError, match="Prompt 1: lost"):
        llm.generate(["a", seen(1)], GREEDY, use_tqdm=False)


def test_a_sequence_that_fails_names_its_prompt(llm: LLM) -> None:
    impossible = GREEDY.replace(allowed_token_ids=[5], logit_bias={}, ignore_eos=False)
    word = llm.get_tokenizer().decode([5])
    with pytest.raises(InvalidRequestError, match=r"Prompt 1: .*no token"):
        llm.generate(["a", "b"], [GREEDY, impossible.replace(bad_words=[word])], use_tqdm=False)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_sequence_that_breaks_the_model_harms_no_other(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    model, engine = parts.runner.model, parts.engine
    prompts = [[50 + i, 60 + i, 70 + i] for i in range(3)]
    expected = answers(llm, prompts)
    embed = model.embed

    def broken(ids: torch.Tensor) -> torch.Tensor:
        if (ids == 70 + bad).any():
            raise RuntimeError("this token breaks it")
        return embed(ids)

    monkeypatch.setattr(model, "embed", broken)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(3)}
    for i, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(i), tuple(prompt), GREEDY, 8, cache_salt=b"anew"))
    errors = []
    while engine.has_work:
        for update in engine.step():
            errors += [update.request_id] if update.error else []
            tokens[update.request_id] += [update.sample.token_id] if update.sample else []
    assert errors == [str(bad)]
    expected[bad] = []
    assert list(tokens.values()) == expected


def test_wrong_types_are_request_errors(llm: LLM) -> None:
    for params in (5, {"temperature": 0}, "greedy", [5]):
        with pytest.raises(InvalidRequestError, match="sampling_params"):
            llm.generate("a", params, use_tqdm=False)  # type: ignore[arg-type]
    for messages in ("hello", {"role": "user", "content": "a"}, None, [], 5):
        with pytest.raises(InvalidRequestError, match="messages"):
            llm.chat(messages, use_tqdm=False)  # type: ignore[arg-type]
    for prompt in (None, 5, {"prompt": "a", "cache_salt": "\ud800"}):
        with pytest.raises(InvalidRequestError):
            llm.generate(prompt, use_tqdm=False)
    assert len(llm.generate(("a", "b"), GREEDY, use_tqdm=False)) == 2
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_what_goes_to_the_engine_can_be_sent(llm: LLM, parts: Parts) -> None:
    """Constraints go compiled: a schema may hold numbers that no message can."""
    schema = {"type": "integer", "maximum": 10**30}
    params = SamplingParams(n=3, seed=5, stop=["x"], structured_outputs={"json": schema})  # type: ignore[arg-type]
    prepared = parts.prepare("a")
    grammar = parts.run(parts.processor.grammar(params))
    requests = parts.processor.requests(prepared, params, "id", 0, 0.0, grammar)
    for request in requests:
        sent = wire.decode_to_engine(wire.encode(wire.Submit(request, ())))
        assert isinstance(sent, wire.Submit)
        assert sent.request == request
    assert [request.params.seed for request in requests] == [5, 6, 7]
    assert len({request.request_id for request in requests}) == 3


def test_long_texts_are_tokenized_off_the_event_loop(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, on_loop = parts.processor.render, []

    def noted(prompt: Prompt) -> RenderedPrompt:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            on_loop.append(False)
        else:
            on_loop.append(True)
        return render(prompt)

    monkeypatch.setattr(parts.processor, "render", noted)
    parts.run(parts.processor.prepare(RawPrompt(text="short")))
    with pytest.raises(PromptTooLongError):
        parts.run(parts.processor.prepare(RawPrompt(text="long" * LONG_TEXT)))
    assert on_loop == [True, False]


def test_a_closed_llm_says_so(tmp_path: Path) -> None:
    checkpoints.make_qwen2_vl(tmp_path)
    llm = LLM(str(tmp_path), num_kv_blocks=40, block_size=16, max_model_len=512)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate("a"), llm.stats):
        with pytest.raises(InvalidRequestError, match="closed"):
            call()
