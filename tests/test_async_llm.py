"""``AsyncLLM`` on a tiny checkpoint.

Outputs, their kinds, ends of all sorts, and the caller's event loop.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from sensorium import LLM, AsyncLLM, PoolingParams, RequestOutput, RequestOutputKind, SamplingParams
from sensorium.engine.outputs.stream import OutputCollector
from sensorium.engine.prompts import expansion, input_processor
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    MediaUndecodableError,
    PromptTooLongError,
)
from tests import checkpoints

ROOM = {"num_kv_blocks": 400, "block_size": 16, "max_model_len": 512, "max_num_seqs": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = GREEDY.replace(max_tokens=400)
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
SECONDS = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def module_llm(folder: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(folder), **ROOM)
    yield llm
    llm.close()


@pytest.fixture
def llm(module_llm: AsyncLLM) -> Iterator[AsyncLLM]:
    yield module_llm
    assert not module_llm.request_ids()
    run(at_rest(module_llm))


@pytest.fixture(scope="module")
def offline(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **ROOM) as llm:
        yield llm


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(bounded())


async def at_rest(llm: AsyncLLM) -> None:
    """Wait until the engine has nothing to do: what was left must end."""
    while True:
        stats = await llm.stats()
        if (stats.num_running, stats.num_waiting, stats.held_features) == (0, 0, 0):
            return
        await asyncio.sleep(0.005)


async def collected(outputs: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    return [output async for output in outputs]


async def last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return (await collected(outputs))[-1]


def ids(output: RequestOutput, sample: int = 0) -> list[int]:
    return output.outputs[sample].token_ids


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (60, 45), (shade, 255 - shade, 90))


def seen(shade: int) -> dict[str, Any]:
    return {"prompt": f"{VISION}what", "multi_modal_data": {"image": picture(shade)}}


def test_outputs_are_those_of_llm(llm: AsyncLLM, offline: LLM) -> None:
    prompts: list[Any] = ["one", seen(1), [5, 6, 7], {"prompt_token_ids": [8, 9]}, seen(200)]
    message = [
        {
            "role": "user",
            "content": [
                {"type": "image_pil", "image_pil": picture(9)},
                {"type": "text", "text": "a"},
            ],
        }
    ]
    expected = offline.generate(prompts, GREEDY, use_tqdm=False)
    [said] = offline.chat(message, GREEDY, use_tqdm=False)

    async def main() -> list[RequestOutput]:
        asked = [last(llm.generate(prompt, GREEDY, f"id {i}")) for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*asked, last(llm.chat(message, GREEDY)))

    outputs = run(main())
    assert [ids(o) for o in outputs] == [ids(o) for o in [*expected, said]]
    assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in [*expected, said]]
    assert [o.prompt_token_ids for o in outputs[:-1]] == [o.prompt_token_ids for o in expected]
    assert [o.request_id for o in outputs[:-1]] == [f"id {i}" for i in range(len(prompts))]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)


def test_cumulative_outputs_grow_and_stay_as_they_were(llm: AsyncLLM) -> None:
    outputs = run(collected(llm.generate("hello", GREEDY.replace(logprobs=1), "mine")))
    whole = outputs[-1]
    assert len(ids(whole)) == 8
    lengths = [len(ids(output)) for output in outputs]
    assert lengths == sorted(set(lengths))
    for output in outputs:
        assert ids(output) == ids(whole)[: len(ids(output))]
        assert whole.outputs[0].text.startswith(output.outputs[0].text)
        assert len(output.outputs[0].logprobs or []) == len(ids(output))
        assert output.finished == (output is whole)


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, "delta"])
def test_deltas_add_up(llm: AsyncLLM, kind: Any) -> None:
    params = SamplingParams(
        n=3, seed=5, max_tokens=12, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    whole = run(last(llm.generate("hello", params)))
    deltas = run(collected(llm.generate("hello", params.replace(output_kind=kind))))
    for sample in whole.outputs:
        parts = [part for delta in deltas for part in delta.outputs if part.index == sample.index]
        assert "".join(part.text for part in parts) == sample.text
        assert [i for part in parts for i in part.token_ids] == sample.token_ids
        assert [i for part in parts for i in part.logprobs or []] == sample.logprobs
        assert [part.finish_reason for part in parts if part.finished] == ["length"]
        assert parts[-1].cumulative_logprob == sample.cumulative_logprob
    assert [d.prompt_logprobs is not None for d in deltas] == [True] + [False] * (len(deltas) - 1)
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]


def test_only_the_final_output(llm: AsyncLLM) -> None:
    whole = run(last(llm.generate("hello", GREEDY)))
    [output] = run(collected(llm.generate("hello", GREEDY.replace(output_kind="final_only"))))
    assert (output.finished, ids(output)) == (True, ids(whole))
    with pytest.raises(InvalidRequestError, match=r"output_kind must be one of .*got 'some'"):
        GREEDY.replace(output_kind="some")


def test_slow_readers_lose_nothing(llm: AsyncLLM) -> None:
    params = GREEDY.replace(max_tokens=64, output_kind="delta")

    async def slowly() -> list[int]:
        found: list[int] = []
        async for output in llm.generate("hello", params):
            found += ids(output)
            await at_rest(llm)  # the whole answer is there before the next output is asked for
        return found

    assert run(slowly()) == ids(run(last(llm.generate("hello", GREEDY.replace(max_tokens=64)))))


def test_the_callers_loop_goes_on(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is prepared, collected or waited for in the caller's thread."""
    caller, used = threading.get_ident(), []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any, **keywords: Any) -> Any:
            used.append((name, threading.get_ident()))
            return function(*arguments, **keywords)

        return note

    async def main() -> int:
        await llm.start()
        monkeypatch.setattr(InputProcessor, "render", noted("render", InputProcessor.render))
        monkeypatch.setattr(input_processor, "expanded", noted("expand", expansion.expanded))
        monkeypatch.setattr(OutputCollector, "apply", noted("apply", OutputCollector.apply))
        num_turns = 0

        async def turns() -> None:
            nonlocal num_turns
            while True:
                num_turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(turns())
        prompts: list[Any] = [*(seen(shade) for shade in range(100, 108)), "long " * 80]
        await asyncio.gather(*(last(llm.generate(prompt, GREEDY)) for prompt in prompts))
        counting.cancel()
        return num_turns

    assert run(main()) > 1000, "the loop went on meanwhile"
    assert {name for name, _ in used} == {"render", "expand", "apply"}
    assert caller not in {thread for _, thread in used}


@pytest.mark.parametrize("shared", [False, True], ids=["one loop each", "loops at once"])
def test_several_event_loops(llm: AsyncLLM, shared: bool) -> None:
    """As test runners and threads make them; an engine of one loop alone would refuse the second."""
    expected = ids(run(last(llm.generate("hello", GREEDY))))
    if not shared:
        assert ids(run(last(llm.generate("hello", GREEDY)))) == expected
        return

    async def main() -> list[RequestOutput]:
        other = asyncio.to_thread(lambda: run(last(llm.generate("hello", GREEDY))))
        return await asyncio.gather(other, last(llm.generate("hello", GREEDY)))

    assert [ids(output) for output in run(main())] == [expected] * 2


QUEUED = {**ROOM, "max_num_seqs": 1, "max_model_len": 2000}


async def queue(llm: AsyncLLM) -> asyncio.Task[RequestOutput]:
    """Start long requests, one after the other.

    The last of them, which is returned, is far from its end.
    """
    params = LONG.replace(max_tokens=1900)
    tasks = [asyncio.create_task(last(llm.generate("hello", params))) for _ in range(40)]
    for task in tasks[:-1]:
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
    while (await llm.stats()).num_waiting < 5:  # a slow reader may never see all of them wait
        await asyncio.sleep(0.01)
    return tasks[-1]


async def started(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return await anext(outputs)


def test_abort_ends_with_an_output_that_says_so(llm: AsyncLLM) -> None:
    async def main() -> list[RequestOutput]:
        outputs = llm.generate("hello", LONG.replace(n=2, temperature=1.0), "mine")
        found = [await started(outputs)]
        await llm.abort("mine")
        await llm.abort(["mine", "nobody's"])
        return found + await collected(outputs)

    *_, end = run(main())
    assert end.finished
    assert [sample.finish_reason for sample in end.outputs] == ["abort"] * 2
    assert 0 < len(ids(end)) < 400


def test_abort_ends_the_work_though_nobody_reads(llm: AsyncLLM) -> None:
    async def main() -> RequestOutput:
        outputs = llm.generate("hello", LONG, "mine")
        await started(outputs)
        await llm.abort("mine")
        before = (await llm.stats()).generation_tokens
        await at_rest(llm)
        assert (await llm.stats()).generation_tokens - before < 100
        return await last(outputs)

    assert run(main()).outputs[0].finish_reason == "abort"


def test_abort_before_anything_is_known(llm: AsyncLLM) -> None:
    """The request waits for its turn, or for its media."""

    async def main() -> RequestOutput:
        others = [asyncio.create_task(last(llm.generate("hello", LONG))) for _ in range(4)]
        mine = asyncio.create_task(last(llm.generate(seen(77), LONG.replace(n=2), "mine")))
        while "mine" not in llm.request_ids():
            await asyncio.sleep(0)
        await llm.abort("mine")
        end = await mine
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return end

    end = run(main())
    assert (end.request_id, end.finished) == ("mine", True)
    assert [(s.finish_reason, s.token_ids) for s in end.outputs] == [("abort", [])] * 2


@pytest.mark.parametrize("how", ["break", "error", "cancel", "forgotten"])
def test_who_leaves_ends_the_work(llm: AsyncLLM, how: str) -> None:
    async def reading(begun: asyncio.Event) -> None:
        async for _ in llm.generate("hello", LONG):
            begun.set()
            if how == "break":
                break
            if how == "error":
                raise ZeroDivisionError

    async def main() -> None:
        begun = asyncio.Event()
        if how == "forgotten":
            outputs = llm.generate("hello", LONG)
            await started(outputs)
            del outputs
        else:
            task = asyncio.create_task(reading(begun))
            await begun.wait()
            if how == "cancel":
                task.cancel()
            [end] = await asyncio.gather(task, return_exceptions=True)
            kinds = {"break": type(None), "error": ZeroDivisionError}
            assert type(end) is kinds.get(how, asyncio.CancelledError)
        while llm.request_ids():
            await asyncio.sleep(0)
        before = (await llm.stats()).generation_tokens
        await at_rest(llm)
        assert (await llm.stats()).generation_tokens - before < 100

    run(main())


def test_ids_are_the_callers(llm: AsyncLLM) -> None:
    """One is in use until its request ends; ids that look like those of samples harm nobody."""

    async def main() -> None:
        outputs = llm.generate("hello", LONG, "mine")
        await started(outputs)
        with pytest.raises(InvalidRequestError, match="'mine' is in use") as caught:
            await last(llm.generate("hello", GREEDY, "mine"))
        assert caught.value.param == "request_id"
        await outputs.aclose()
        assert len(ids(await last(llm.generate("hello", GREEDY, "mine")))) == 8
        both = [llm.generate("hello", GREEDY.replace(n=2), "a"), llm.generate("b", GREEDY, "a#1")]
        first, second = await asyncio.gather(*map(last, both))
        assert [len(s.token_ids) for s in [*first.outputs, *second.outputs]] == [8] * 3
        for wrong in ("", 5):
            with pytest.raises(InvalidRequestError, match="request_id must be"):
                await last(llm.generate("hello", GREEDY, wrong))  # type: ignore[arg-type]

    run(main())


def test_what_cannot_be_served_raises(llm: AsyncLLM) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    cases: list[tuple[type[Exception], Callable[[], AsyncGenerator[RequestOutput, None]]]] = [
        (PromptTooLongError, lambda: llm.generate("long " * 1000, GREEDY)),
        (InvalidRequestError, lambda: llm.generate(5.0, GREEDY)),
        (InvalidRequestError, lambda: llm.generate("a", {"temperature": 0})),  # type: ignore[arg-type]
        (MediaUndecodableError, lambda: llm.chat([{"role": "user", "content": [broken]}], GREEDY)),
        (
            InvalidRequestError,
            lambda: llm.generate("a", GREEDY.replace(structured_outputs={"regex": "("})),
        ),
    ]

    async def main() -> None:
        for kind, ask in cases:
            with pytest.raises(kind):
                await last(ask())
        with pytest.raises(InvalidRequestError, match="generates text"):
            await llm.embed("a")
        assert len(ids(await last(llm.generate("hello", GREEDY)))) == 8

    run(main())


def test_what_llm_tells(llm: AsyncLLM, offline: LLM) -> None:
    async def main() -> None:
        assert await llm.get_default_sampling_params() == offline.get_default_sampling_params()
        tokenizer = await llm.get_tokenizer()
        assert tokenizer.encode("hello") == offline.get_tokenizer().encode("hello")
        await llm.check_health()

    run(main())


def test_vectors(tmp_path: Path) -> None:
    folder = str(checkpoints.make_embedder("llama", tmp_path))
    with LLM(folder, **ROOM) as offline:
        expected = offline.embed(["one", "two"], use_tqdm=False)

    async def main() -> None:
        async with AsyncLLM(folder, **ROOM) as llm:
            found = await asyncio.gather(llm.embed("one", request_id="mine"), llm.embed("two"))
            assert [o.outputs.embedding for o in found] == [o.outputs.embedding for o in expected]
            assert found[0].request_id == "mine"
            [tensor] = [o async for o in llm.encode("one", PoolingParams())]
            assert tensor.outputs.data.tolist() == expected[0].outputs.embedding
            waiting = asyncio.create_task(llm.embed("three " * 60, request_id="mine"))
            while "mine" not in llm.request_ids():
                await asyncio.sleep(0)
            await llm.abort("mine")
            with pytest.raises(InvalidRequestError, match="'mine' was aborted"):
                await waiting
            await at_rest(llm)

    run(main())


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def wait_for_the_end_of_all_but(before: set[int]) -> None:
    """Return when each child but these has ended: one that is killed takes a moment."""
    deadline = time.monotonic() + SECONDS
    while not children() <= before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def own_threads() -> set[threading.Thread]:
    """Threads beside those that asyncio keeps for this test's own loop."""
    own = asyncio.get_running_loop()._default_executor  # type: ignore[attr-defined]
    kept = set() if own is None else own._threads
    return set(threading.enumerate()) - kept


def test_closing_ends_everything(folder: Path) -> None:
    """Also requests that run; those that come later are refused."""

    async def main() -> None:
        before, threads = children(), own_threads()
        llm = AsyncLLM(str(folder), **QUEUED)
        reading = await queue(llm)
        assert children() > before
        await asyncio.to_thread(llm.close)
        llm.shutdown()
        with pytest.raises(InvalidRequestError, match="This AsyncLLM has been closed"):
            await reading
        for call in (last(llm.generate("a", GREEDY)), llm.abort("a"), llm.stats()):
            with pytest.raises(InvalidRequestError, match="closed"):
                await call
        assert children() <= before
        assert own_threads() <= threads

    run(main())


@pytest.mark.parametrize("when", ["used", "in an answer", "starting"])
def test_one_that_nobody_holds_ends_everything(folder: Path, when: str) -> None:
    before, threads = children(), psutil.Process().num_threads()

    async def main() -> None:
        llm = AsyncLLM(str(folder), **ROOM)
        if when == "used":
            await last(llm.generate("hello", GREEDY))
        elif when == "in an answer":
            await started(llm.generate("hello", LONG))

    run(main())
    gc.collect()
    wait_for_the_end_of_all_but(before)
    assert (
        psutil.Process().num_threads() <= threads + 1
    )  # the one that waits for a process ends by itself


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_num_sequences"):
        AsyncLLM(str(tmp_path), max_num_sequences=5)

    async def main() -> None:
        async with AsyncLLM(str(tmp_path / "nothing")):
            pass

    with pytest.raises(ConfigError, match="nothing"):
        run(main())


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("own", [False, True])
def test_a_forked_process(llm: AsyncLLM, folder: Path, own: bool) -> None:
    """As workers of a server that loads before it forks.

    The parent's is refused, one of its own works.
    """
    expected = ids(run(last(llm.generate("hello", GREEDY))))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def use() -> None:
        try:
            mine = AsyncLLM(str(folder), **ROOM) if own else llm
            theirs.send(ids(run(last(mine.generate("hello", GREEDY)))))
            mine.close()
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")

    child = context.Process(target=use)
    child.start()
    try:
        assert ours.poll(SECONDS), "the child hangs"
        found = ours.recv()
        child.join(SECONDS)
    finally:
        child.kill()
    if own:
        assert found == expected
    else:
        assert found.startswith("ForkedProcessError: This AsyncLLM belongs to the process")
    assert ids(run(last(llm.generate("hello", GREEDY)))) == expected


def test_an_engine_that_dies(folder: Path) -> None:
    async def main() -> None:
        before = children()
        async with AsyncLLM(str(folder), **QUEUED) as llm:
            reading = await queue(llm)
            started_by_it = [psutil.Process(pid) for pid in children() - before]
            [engine] = [
                p for p in started_by_it if "sensorium.engine.serving.worker" in p.cmdline()
            ]
            engine.kill()
            with pytest.raises(EngineDeadError):
                await reading
            while True:
                try:
                    await llm.check_health()
                    break
                except EngineDeadError:
                    await asyncio.sleep(0.05)
            assert len(ids(await last(llm.generate("hello", GREEDY)))) == 8

    run(main())
