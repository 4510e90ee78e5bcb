"""Two ranks give the tokens of one process, with prompts in chunks, preempted and from caches."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium import LLM, LoRARequest, SamplingParams
from sensorium.distributed.collectives import Collectives
from sensorium.engine.parallel import messages
from sensorium.engine.parallel.group import RankGroup
from sensorium.errors import EngineDeadError
from sensorium.kernels.cpu.graph import StepGraph
from sensorium.kernels.cpu.linear import floats
from tests import checkpoints
from tests.checkpoints.adapters import make_adapter
from tests.e2e.test_invariance import (
    FAMILIES,
    NUMBERS,
    THROUGH_TRANSFORMERS,
    Prompts,
    ask,
    bits,
    make_prompts,
)
from tests.parts import build_patient
from tests.ranks import in_threads

NATIVE = [f for f in FAMILIES if f not in (*THROUGH_TRANSFORMERS, "mistral, windowed")]
SIZE = 16
"""Tokens of a block."""
NUM_TOKENS = 2 * SIZE
"""Every sequence grows by two blocks."""


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        in_threads(patch)
        yield


def answers(
    llm: LLM, prompts: Prompts, num_tokens: int = NUM_TOKENS, adapters: Any = None
) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
    return [output.outputs[0].token_ids for output in outputs]


def scarce(lengths: list[int]) -> dict[str, int]:
    """Return options with which two prompts of these lengths, cut up, displace each other."""
    num_blocks = sum(-(-length // SIZE) for length in lengths)
    return {
        "block_size": SIZE,
        "num_kv_blocks": num_blocks + 1,
        "max_model_len": max(lengths) + NUM_TOKENS,
        "max_num_batched_tokens": sum(lengths) // 3,
    }


@pytest.mark.parametrize("family", NATIVE)
def test_every_family(family: str, tmp_path: Path, threads: None) -> None:
    """One prompt has an adapter of all layers, the other none."""
    make, modality, placeholder = FAMILIES[family]
    base = tmp_path / "base"
    base.mkdir()
    make(base)
    adapter = LoRARequest("a", 1, str(make_adapter(tmp_path / "adapter", base)))
    own = [adapter, None]
    prompts = make_prompts(modality, placeholder, count=7)
    prompts = prompts[1:3] if modality else [prompts[3], prompts[6]]
    shared: dict[str, Any] = {"dtype": "float32", "enable_lora": True}
    with LLM(str(base), num_kv_blocks=400, max_model_len=512, **shared) as llm:
        expected = answers(llm, prompts, adapters=own)
        outs = llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    options = scarce([len(out.prompt_token_ids) for out in outs]) | {"tensor_parallel_size": 2}
    encoders = "all" if NATIVE.index(family) % 2 else "first"
    with build_patient(base, encoder_ranks=encoders, **options, **shared) as parts:
        assert answers(parts.llm, prompts, adapters=own) == expected
        assert parts.engine.stats().num_preemptions
        again = answers(parts.llm, prompts, 3, adapters=own)
        assert again == [tokens[:3] for tokens in expected]
        assert parts.engine.stats().prefix_hits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_text("llama", tmp_path_factory.mktemp("llama"))


def test_bits_do_not_depend_on_the_batch(
    llama: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on whether steps are captured and replayed."""
    options = {"dtype": "float32", "tensor_parallel_size": 2, "max_model_len": 256}
    prompts = make_prompts("", "", count=4)
    captured: list[int] = []
    capture = StepGraph.__init__

    def noted(graph: StepGraph, *arguments: Any) -> None:
        capture(graph, *arguments)
        captured.append(threading.get_ident())

    with monkeypatch.context() as patch, LLM(str(llama), num_kv_blocks=80, **options) as llm:
        patch.setattr(StepGraph, "__init__", noted)
        together = ask(llm, prompts, [0, 1, 2, 3])
    if floats.available("float16"):  # there are kernels to capture
        assert len(set(captured)) == 2, "both ranks replay steps"
    eager = {"max_num_batched_tokens": 7, "enforce_eager": True}
    with LLM(str(llama), num_kv_blocks=80, **eager, **options) as llm:
        assert [ask(llm, prompts, [index])[0] for index in range(4)] == together


ROUNDED = {"int8": 0.5, "int4": 0.5, "int8 cache": 0.05}
"""Differences of log probabilities: ranks round parts of rows, of which the sums are compared."""


@pytest.mark.parametrize("numbers", [*ROUNDED, "ngram"])
def test_other_numbers(numbers: str, llama: Path, threads: None) -> None:
    own = {"speculative": "ngram"} if numbers == "ngram" else NUMBERS[numbers]
    options: dict[str, Any] = {**own, "dtype": "float32", "num_kv_blocks": 40, "max_model_len": 256}
    prompt = {"prompt": "one two three " * 9}
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=5)
    found = []
    for size in (1, 2):
        with LLM(str(llama), tensor_parallel_size=size, **options) as llm:
            [out] = llm.generate([prompt], params, use_tqdm=False)
            found.append(bits(out))
    (one_tokens, one), (two_tokens, two) = found
    if numbers == "ngram":
        assert one_tokens == two_tokens
    shared = one[0].keys() & two[0].keys()
    assert len(shared) >= 3
    assert max(abs(one[0][i] - two[0][i]) for i in shared) < ROUNDED.get(numbers, 1e-4)


def test_items_are_encoded_by_all_ranks(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, modality, placeholder = FAMILIES["qwen2_vl"]
    base = tmp_path / "base"
    base.mkdir()
    make(base)
    own = LoRARequest("a", 1, str(make_adapter(tmp_path / "adapter", base)))
    prompts = make_prompts(modality, placeholder, count=6)[2:6:3]  # two items each
    options: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 80, "max_model_len": 512}
    options["enable_lora"] = True
    with LLM(str(base), **options) as llm:
        expected = answers(llm, prompts, 4, own)
        assert answers(llm, prompts, 4) != expected
    received: list[int] = []
    broken: list[messages.Encode] = []
    receive, send = Collectives.receive, messages.encode

    def counted(ranks: Collectives, x: torch.Tensor, rank: int) -> torch.Tensor:
        received.append(rank)
        return receive(ranks, x, rank)

    monkeypatch.setattr(Collectives, "receive", counted)
    with build_patient(base, tensor_parallel_size=2, encoder_ranks="all", **options) as parts:
        assert answers(parts.llm, prompts, 4, own) == expected
        assert len(received) == 1  # all four at once

        def damaged(message: Any) -> bytes:
            if isinstance(message, messages.Encode):
                broken.append(message)
                message.items[0].arrays.clear()
            return send(message)

        monkeypatch.setattr(messages, "encode", damaged)
        parts.runner.reset()
        parts.scheduler.reset()
        assert answers(parts.llm, prompts, 4, own) == expected  # the first rank does it instead
        assert broken
        assert len(received) == 1


def test_an_interrupted_encoding_leaves_no_embeddings_to_others(
    tmp_path: Path, threads: None, ctrl_c: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, modality, placeholder = FAMILIES["qwen2_vl"]
    make(tmp_path)
    first, other = make_prompts(modality, placeholder, count=6)[2:6:3]  # two items each
    options = {"dtype": "float32", "num_kv_blocks": 80, "max_model_len": 512}
    with LLM(str(tmp_path), **options) as llm:
        expected = answers(llm, [other], 4)
    send_to, presses = RankGroup.send_to, [1]

    def pressed(group: RankGroup, rank: int, data: bytes) -> None:
        send_to(group, rank, data)
        for _ in range(presses.pop() if presses else 0):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RankGroup, "send_to", pressed)
    with build_patient(tmp_path, tensor_parallel_size=2, encoder_ranks="all", **options) as parts:
        with pytest.raises(KeyboardInterrupt):
            answers(parts.llm, [first], 4)
        assert answers(parts.llm, [other], 4) == expected
        presses.append(2)
        with pytest.raises(KeyboardInterrupt):
            answers(parts.llm, [first], 4)
        with pytest.raises(EngineDeadError, match="was broken off"):
            answers(parts.llm, [other], 4)
