"""Ranks as processes: what each holds, the end of one, and what they refuse."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sensorium import LLM, LoRARequest, SamplingParams
from sensorium.config import engine_config
from sensorium.core.request import EngineRequest
from sensorium.distributed.collectives import Collectives
from sensorium.engine import loading
from sensorium.engine.parallel import group as groups
from sensorium.engine.parallel import worker
from sensorium.engine.parallel.adapters import RankLanes
from sensorium.engine.parallel.group import RankGroup
from sensorium.engine.parallel.messages import AdapterPart, Begin
from sensorium.engine.parallel.model import shares_of
from sensorium.engine.parallel.worker import Rank
from sensorium.engine.serving.client import EngineClient, OutputQueue
from sensorium.engine.serving.process import EngineProcess
from sensorium.errors import ConfigError, EngineDeadError, UnavailableError
from sensorium.models import loader
from sensorium.models.loading.fill import weight_bytes
from tests import checkpoints
from tests.checkpoints.adapters import make_adapter
from tests.checkpoints.hf import make_hf_text
from tests.parts import build_llm
from tests.ranks import in_threads

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 8, "max_model_len": 64}
PROMPTS = ["one two three", "four five six seven eight"]
PARAMS = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


def answers(llm: LLM, adapter: LoRARequest | None = None) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, lora_request=adapter)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = tmp_path_factory.mktemp("llama")
    checkpoints.make_text("llama", own)
    return own


def test_a_process_that_ends_takes_the_engine_along(folder: Path) -> None:
    with build_llm(folder, **OPTIONS) as whole:
        expected, num_bytes = answers(whole.llm), weight_bytes(whole.runner.model)  # type: ignore[arg-type]
    with build_llm(folder, tensor_parallel_size=2, **OPTIONS) as parts:
        assert answers(parts.llm) == expected
        group: RankGroup = parts.engine.release.__self__  # type: ignore[attr-defined]
        assert group.weight_bytes[0] <= 0.55 * num_bytes
        (process,) = group.processes
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        process.wait()
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="start the engine again"):
                answers(parts.llm)
    assert not group.processes


async def test_requests_of_a_server_end_with_a_rank(folder: Path, tmp_path: Path) -> None:
    """The supervisor replaces an engine that has ended. Before that, it takes adapters."""
    process = EngineProcess().start()
    options = {**OPTIONS, "tensor_parallel_size": 2, "enable_lora": True}
    client = EngineClient(engine_config(model=str(folder), **options), process)
    output_queue: OutputQueue = asyncio.Queue()
    try:
        await asyncio.wait_for(client.start(), 120)
        assert (await client.stats()).num_ranks == 2
        adapter = make_adapter(tmp_path / "a", folder)
        assert (await client.load_adapter("a", str(adapter), "")).adapters[0].name == "a"
        assert not (await client.unload_adapter("a")).adapters
        children = psutil.Process().children(recursive=True)
        (rank,) = (child for child in children if worker.__name__ in child.cmdline())
        rank.suspend()  # the first step waits for it
        client.submit(EngineRequest("a", (1, 2, 3), PARAMS, 5), [], output_queue)
        rank.kill()
        error = await asyncio.wait_for(output_queue.get(), 60)
        assert isinstance(error, EngineDeadError)
        assert error.status == 503
        await asyncio.wait_for(client.wait_ended(), 60)
        assert process.returncode == 1
        psutil.wait_procs([rank], timeout=300)
        assert not rank.is_running()
    finally:
        await client.stop()


def test_what_does_not_fit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_threads(monkeypatch)
    with pytest.raises(ConfigError, match=r"4 heads, 2 of keys.*: use 2 or 4") as caught:
        LLM(str(folder), tensor_parallel_size=3, **OPTIONS)
    assert caught.value.param == "tensor_parallel_size"


def test_models_of_transformers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads(monkeypatch)
    make_hf_text("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="cannot be divided here") as caught:
        LLM(str(tmp_path), tensor_parallel_size=2, **OPTIONS)
    assert caught.value.param == "tensor_parallel_size"


def test_shares_of_items() -> None:
    assert shares_of([4, 4, 4], 2) == [[0, 2], [1]]
    assert shares_of([10, 1, 1, 7, 2], 2) == [[0, 2], [3, 4, 1]]
    assert shares_of([5, 5], 3) == [[0], [1], []]


def test_four_ranks_share_two_heads_of_keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_threads(monkeypatch)
    with LLM(str(folder), **OPTIONS) as llm:
        expected = answers(llm)
    with LLM(str(folder), tensor_parallel_size=4, **OPTIONS) as llm:
        assert answers(llm) == expected


def test_gpus_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_threads(monkeypatch)
    monkeypatch.setattr(loader, "find_device", lambda name: torch.device("cuda", 1))
    with pytest.raises(ConfigError, match=r"device is cuda:1: .* on CPUs alone") as caught:
        LLM(str(folder), tensor_parallel_size=2, **OPTIONS)
    assert caught.value.param == "tensor_parallel_size"


def test_what_keeps_a_rank_from_starting_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads(monkeypatch)

    def full(*arguments: object) -> None:
        raise ConfigError("no memory for the cache", param="kv_cache_memory_bytes")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "allocate_cache", full)  # the first rank has it by its name
        with pytest.raises(ConfigError, match="no memory for the cache"):
            LLM(str(folder), tensor_parallel_size=2, **OPTIONS)

    def end(*arguments: object) -> None:
        raise SystemExit

    monkeypatch.setattr(Rank, "join", end)
    monkeypatch.setattr(groups, "MEETING_SECONDS", 1e6)
    with pytest.raises(EngineDeadError, match="has ended"):
        LLM(str(folder), tensor_parallel_size=2, **OPTIONS)


def test_ranks_load_what_the_first_one_has_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads(monkeypatch)
    chosen: list[tuple[str, str]] = []
    begin = Rank.__init__
    changes = False

    def noted(rank: Rank, message: Begin, *, is_own_process: bool) -> None:
        model = message.config.model
        chosen.append((model.model, model.dtype))
        if changes:
            model = dataclasses.replace(model, dtype="float16")
            message.config = dataclasses.replace(message.config, model=model)
        begin(rank, message, is_own_process=is_own_process)

    monkeypatch.setattr(Rank, "__init__", noted)
    monkeypatch.chdir(folder.parent)
    options = {**OPTIONS, "dtype": "auto", "tensor_parallel_size": 2}
    with build_llm(folder.name, **options) as parts:
        assert chosen == [(str(folder), parts.engine.facts.dtype)]
    changes = True
    with pytest.raises(ConfigError, match="have loaded different models"):
        LLM(folder.name, **options)


def test_an_adapter_is_in_all_ranks_or_in_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads(monkeypatch)
    first, second, dora = (
        LoRARequest(name, seed, str(make_adapter(tmp_path / name, folder, seed=seed, **own)))
        for seed, (name, own) in enumerate({"a": {}, "b": {}, "c": {"use_dora": True}}.items())
    )
    own = {**OPTIONS, "enable_lora": True, "max_loras": 1}
    with LLM(str(folder), **own) as llm:
        expected = [answers(llm, request) for request in (None, first, second)]
    take, modules = RankLanes.take, [0]

    def full(lanes: RankLanes, message: AdapterPart) -> None:
        modules[0] += 1
        if modules[0] == 3:
            raise MemoryError
        take(lanes, message)

    monkeypatch.setattr(RankLanes, "take", full)
    with LLM(str(folder), tensor_parallel_size=2, **own) as llm:
        with pytest.raises(UnavailableError, match="could not take the adapter"):
            answers(llm, first)
        assert not llm.stats().lora_num_bytes
        found = [answers(llm, request) for request in (None, first, second)]
        with pytest.raises(ConfigError, match=r"use_dora .* divided between several"):
            answers(llm, dora)
        assert [*found, answers(llm)] == [*expected, expected[0]]


def test_ctrl_c_comes_when_all_are_in_step(
    folder: Path, ctrl_c: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads(monkeypatch)
    broadcast, presses = Collectives.broadcast, [0]

    def pressed(ranks: Collectives, x: torch.Tensor) -> torch.Tensor:
        if ranks.shard.rank == 0 and presses:
            for _ in range(presses.pop()):
                signal.raise_signal(signal.SIGINT)
        return broadcast(ranks, x)

    monkeypatch.setattr(Collectives, "broadcast", pressed)
    with LLM(str(folder), tensor_parallel_size=2, **OPTIONS) as llm:
        expected = answers(llm)
        presses.append(1)
        with pytest.raises(KeyboardInterrupt):
            answers(llm)
        assert answers(llm) == expected
        presses.append(2)
        with pytest.raises(KeyboardInterrupt):
            answers(llm)
        with pytest.raises(EngineDeadError, match="was broken off"):
            answers(llm)
