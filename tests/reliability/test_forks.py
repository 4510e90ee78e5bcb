"""Processes forked from one that runs a model.

An error that says what to do, instead of waiting for ever.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sensorium import LLM, SamplingParams
from sensorium.errors import ForkedProcessError
from tests.checkpoints import make_qwen2_vl
from tests.reliability.media import picture_url

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
FORK = multiprocessing.get_context("fork")
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SECONDS = 300
"""After which a child is believed to hang."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), num_kv_blocks=64, block_size=16, max_model_len=256) as llm:
        answer(llm)
        yield llm


def answer(llm: LLM) -> list[int]:
    return llm.generate("hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def seen(seed: int) -> list[dict[str, Any]]:
    picture = {"type": "image_url", "image_url": {"url": picture_url(seed)}}
    return [{"role": "user", "content": [picture]}]


def in_child(use: Callable[[], object]) -> str:
    """Kind and message of what ``use`` raises in a forked child, "" when it raises nothing."""
    ours, theirs = FORK.Pipe()

    def run() -> None:
        try:
            use()
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")
        else:
            theirs.send("")

    child = FORK.Process(target=run)
    child.start()
    try:
        assert ours.poll(SECONDS), "the child hangs"
        return str(ours.recv())
    finally:
        child.kill()
        child.join()


MESSAGES = [{"role": "user", "content": "hello"}]
USES: dict[str, Callable[[LLM], object]] = {
    "generate": answer,
    "generate, as they finish": lambda llm: next(llm.generate("hello", GREEDY, stream=True)),
    "chat": lambda llm: llm.chat(MESSAGES, GREEDY, use_tqdm=False),
    "chat_stream": lambda llm: next(llm.chat_stream(MESSAGES, GREEDY)),
    "embed": lambda llm: llm.embed("hello", use_tqdm=False),
    "stats": lambda llm: llm.stats(),
}


@pytest.mark.parametrize("use", USES)
def test_an_llm_of_the_parent(llm: LLM, use: str) -> None:
    said = in_child(lambda: USES[use](llm))
    assert said.startswith("ForkedProcessError: This LLM belongs to the process"), said
    assert "'spawn'" in said
    assert len(answer(llm)) == 4


def test_an_llm_of_its_own(llm: LLM, folder: Path) -> None:
    said = in_child(lambda: LLM(str(folder)))
    assert said.startswith("ForkedProcessError: No model can run in this process"), said
    assert "'spawn'" in said
    assert "before the first LLM" in said


def test_an_answer_that_the_parent_began(llm: LLM) -> None:
    stream = llm.chat_stream(MESSAGES, GREEDY)
    next(stream)
    assert "'spawn'" in in_child(lambda: next(stream))
    assert len(list(stream)) == 3, "the parent's goes on"


def test_a_pool(llm: LLM) -> None:
    """The error comes back to the parent as what it is."""
    with ProcessPoolExecutor(1, mp_context=FORK) as pool:
        _POOLED.append(llm)
        try:
            with pytest.raises(ForkedProcessError, match="spawn") as caught:
                pool.submit(_answer_pooled).result(SECONDS)
        finally:
            _POOLED.clear()
    assert caught.value.code == "forked_process"


_POOLED: list[LLM] = []


def _answer_pooled() -> list[int]:
    return answer(_POOLED[0])


class Prompts(torch.utils.data.Dataset[Any]):
    """Prompts, with the model's own answers when ``llm`` is given."""

    def __init__(self, llm: LLM | None) -> None:
        self.llm = llm

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return f"hello {index}" if self.llm is None else answer(self.llm)


def test_workers_of_a_data_loader(llm: LLM) -> None:
    def loader(dataset: Prompts) -> Any:
        return torch.utils.data.DataLoader(
            dataset, batch_size=None, num_workers=1, multiprocessing_context=FORK, timeout=SECONDS
        )

    with pytest.raises(ForkedProcessError, match="DataLoader worker process 0"):
        list(loader(Prompts(llm)))
    outputs = list(llm.generate(loader(Prompts(None)), GREEDY, use_tqdm=False))
    assert [output.prompt for output in outputs] == ["hello 0", "hello 1"]


def test_children_that_end_take_nothing_of_the_parent_along(llm: LLM) -> None:
    """As workers of a server do that forks them and lets them end as Python does."""
    constrained = GREEDY.replace(structured_outputs={"choice": ["red", "blue"]}, max_tokens=32)
    constrained = constrained.replace(ignore_eos=False)

    def outputs() -> list[Any]:
        texts = llm.generate("color", constrained, use_tqdm=False)
        return [texts[0].outputs[0].text, llm.chat(seen(0), GREEDY, use_tqdm=False)[0].outputs]

    expected = outputs()
    helpers = psutil.Process().children()
    assert len(helpers) >= 2, "that media workers are forked from, and that compiles constraints"
    for ends_by in (lambda: None, llm.close):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                ends_by()
                weakref.finalize._exitfunc()  # type: ignore[attr-defined]  # as at the end of Python
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    llm.chat(seen(1), GREEDY, use_tqdm=False)
    assert all(helper.status() != psutil.STATUS_ZOMBIE for helper in helpers), "one was ended"
    assert outputs() == expected


CHILD_FIRST = """
    import multiprocessing, json, sys
    from sensorium import LLM, SamplingParams

    GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def answer(pipe=None):
        with LLM(sys.argv[1], num_kv_blocks=64, block_size=16, max_model_len=256) as llm:
            ids = llm.generate("hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        if pipe is not None:
            pipe.send(ids)
        return ids

    if __name__ == "__main__":
        found = []
        for method in ("fork", "spawn"):
            context = multiprocessing.get_context(method)
            ours, theirs = context.Pipe()
            child = context.Process(target=answer, args=(theirs,))
            child.start()
            assert ours.poll(300), "the child hangs"
            found.append(ours.recv())
            child.join()
            found.append(answer())
        print(json.dumps(found))
"""


def test_children_forked_before_a_model_ran_and_spawned_ones_work(
    folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(CHILD_FIRST))
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    forked, here, spawned, again = json.loads(done.stdout)
    assert len(forked) == 4
    assert forked == here == spawned == again
