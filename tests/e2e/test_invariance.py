"""A request's tokens and log-probabilities are the same bits alone, batched, in chunks,
preempted and from caches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium import LLM, RequestOutput, SamplingParams
from sensorium.config import engine_config
from sensorium.engine.executor import is_batch_invariant
from sensorium.errors import ConfigError
from sensorium.kernels import ops
from sensorium.kernels.cpu import amx
from tests import checkpoints
from tests.checkpoints.hf import make_hf_text
from tests.e2e.prompts import WORDS, image
from tests.parts import patient_llm

NUMBERS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8", "quantization_towers": "int8"},
    "int8 cache": {"dtype": "float32", "kv_cache_dtype": "int8"},
    "int4": {"dtype": "float32", "quantization": "int4", "quantization_towers": "int4"},
}
"""Options of an engine by the name of its numbers."""
ALL_NUMBERS = ("llava", "qwen2_vl")
HALVES = ("bfloat16", "int8", "int8 cache"), ("float16", "int4")
"""Numbers besides float32 of every second family with media, and of the others with media."""
IN_TURN = ("bfloat16", "float16", "int8 cache")
"""Numbers besides float32 of families of text, of which each has one."""
THROUGH_TRANSFORMERS = ("cohere", "gemma2", "gemma3_text", "gpt2", "olmo2")
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
Make = Callable[[Path], Any]
FAMILIES: dict[str, tuple[Make, str, str]] = {
    "llava": (checkpoints.make_llava, "image", "<image>"),
    "llava_onevision": (checkpoints.make_llava_onevision, "image", "<image>"),
    "qwen2_vl": (checkpoints.make_qwen2_vl, "image", QWEN),
    "qwen2_5_vl": (checkpoints.make_qwen2_5_vl, "image", QWEN),
    "qwen3_vl": (checkpoints.make_qwen3_vl, "image", QWEN),
    "phi3_v": (checkpoints.make_phi3_v, "image", "<|image_{}|>"),
    "minicpmv": (checkpoints.make_minicpmv, "image", "(<image>./</image>)"),
    "ultravox": (checkpoints.make_ultravox, "audio", "<|audio|>"),
    **{
        family: (lambda folder, own=family: checkpoints.make_text(own, folder), "", "")
        for family in ("llama", "qwen2", "qwen3", "mistral", "phi3")
    },
    **{
        family: (lambda folder, own=family: make_hf_text(own, folder), "", "")
        for family in THROUGH_TRANSFORMERS
    },
    "mistral, windowed": (
        lambda folder: checkpoints.make_text("mistral", folder, sliding_window=17),
        "",
        "",
    ),
}
SMALL = {"block_size": 16, "max_model_len": 512}
ROOMY = {"num_kv_blocks": 800, **SMALL}
CHANGED: dict[str, dict[str, Any]] = {
    "together": ROOMY,
    "in chunks": {**ROOMY, "max_num_batched_tokens": 7},
    "in other chunks": {**ROOMY, "max_num_batched_tokens": 45, "block_size": 32},
    "preempted": {"num_kv_blocks": 40, **SMALL, "max_num_batched_tokens": 64},
    "on three threads": {**ROOMY, "num_threads": 3},
    "on sixteen threads, in chunks": {**ROOMY, "num_threads": 16, "max_num_batched_tokens": 45},
}
FEWER = ("in chunks", "preempted", "on sixteen threads, in chunks")
"""What is changed with families that do not have all numbers."""
Prompts = list[dict[str, Any]]


def own_products(numbers: str) -> bool:
    """Return whether the numbers' weights that are not quantized run through our own products."""
    return ops.has_own_product(getattr(torch, NUMBERS[numbers]["dtype"]))


def make_prompts(modality: str, placeholder: str, count: int = 10) -> Prompts:
    """Prompts of several lengths, every second with one or two items; some begin alike."""
    rng = np.random.default_rng(5)
    opening = " ".join(rng.choice(WORDS, 40))
    prompts: Prompts = []
    for index in range(count):
        items = [_item(modality, rng) for _ in range(index % 3)] if modality else []
        places = "".join(placeholder.format(i + 1) for i in range(len(items)))
        text = " ".join(rng.choice(WORDS, rng.integers(1, 30)))
        prompts.append({"prompt": f"{opening if index % 4 == 0 else ''}{places} {text}"})
        if items:
            prompts[-1]["multi_modal_data"] = {modality: items}
    return prompts


def _item(modality: str, rng: np.random.Generator) -> Any:
    if modality == "image":
        return image(rng)
    return rng.normal(0, 0.1, int(rng.integers(2000, 30000))).astype(np.float32), 16000


DRAWN: tuple[dict[str, Any], ...] = (
    {"temperature": 0.9},
    {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 300, "repetition_penalty": 1.2},
    {"temperature": 100.0, "top_p": 0.99, "min_p": 0.1},
)


def sampling(index: int) -> SamplingParams:
    """Greedy for some prompts, seeded for the others, with all kinds of filters and numbers of
    log-probabilities.
    """
    chosen = {"temperature": 0.0} if index % 2 else DRAWN[index // 2 % len(DRAWN)]
    return SamplingParams(
        **chosen, seed=index, max_tokens=9, ignore_eos=True, logprobs=(2, 5, 20)[index % 3]
    )


def bits(out: RequestOutput) -> tuple[list[int], list[dict[int, float]]]:
    """Tokens and log-probabilities of an answer."""
    answer = out.outputs[0]
    assert answer.logprobs is not None
    found = [{i: entry.logprob for i, entry in at.items()} for at in answer.logprobs]
    return answer.token_ids, found


def ask(llm: LLM, prompts: Prompts, indexes: list[int]) -> list[Any]:
    outs = llm.generate(
        [prompts[i] for i in indexes], [sampling(i) for i in indexes], use_tqdm=False
    )
    return [bits(out) for out in outs]


def alone(folder: str, numbers: str, prompts: Prompts) -> list[Any]:
    """Every answer of an engine that has nothing else to do, and no prefix cache."""
    options = {**ROOMY, **NUMBERS[numbers]}
    with LLM(folder, enable_prefix_caching=False, max_num_seqs=1, **options) as llm:
        return [ask(llm, prompts, [index])[0] for index in range(len(prompts))]


@pytest.fixture(scope="module")
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Prompts]:
    make, modality, placeholder = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(folder)
    return str(folder), make_prompts(modality, placeholder)


def cases() -> list[tuple[str, str]]:
    """Families with their numbers: all with two families, a part of them with each other one.

    Layers do not know their numbers, and kernels do not know the family that they run in. The
    decoders of families of text are those of families with media.
    """
    found = []
    for index, (name, (_, modality, _)) in enumerate(FAMILIES.items()):
        others = HALVES[index % 2] if modality else IN_TURN[index % 3 :][:1]
        chosen = set(NUMBERS) if name in ALL_NUMBERS else {"float32", *others}
        found += [(name, numbers) for numbers in NUMBERS if numbers in chosen]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("family", "numbers"), cases(), indirect=["family"])
def test_families(family: tuple[str, Prompts], numbers: str) -> None:
    folder, prompts = family
    expected = alone(folder, numbers, prompts)
    everything = list(range(len(prompts)))
    own = Path(folder).name[:-1]
    same = own not in ("minicpmv", *THROUGH_TRANSFORMERS)
    for name, changed in CHANGED.items():
        if name not in FEWER and own not in ALL_NUMBERS:
            continue
        if "num_threads" in changed and not (same and own_products(numbers)):
            continue  # torch's functions and libraries cut their work by the number of threads
        with patient_llm(folder, batch_invariant=True, **NUMBERS[numbers], **changed) as llm:
            assert ask(llm, prompts, everything) == expected, name
            assert ask(llm, prompts, everything[::-1]) == expected[::-1], f"{name}, from caches"


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8", "int4", "int8 cache"])
def demo(request: pytest.FixtureRequest) -> tuple[str, Prompts, list[Any]]:
    chat = "<|im_start|>user\n{}What is in the picture?<|im_end|>\n<|im_start|>assistant\n"
    prompts = make_prompts("image", QWEN, 8)
    for index, prompt in enumerate(prompts):
        prompt["prompt"] = chat.format(QWEN * (index % 3))
    return request.param, prompts, alone("demo", request.param, prompts)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    indexes=st.lists(st.integers(0, 7), min_size=1, max_size=20),
    budget=st.sampled_from([5, 16, 33, 100, 2048]),
    num_blocks=st.sampled_from([36, 60, 800]),
    threads=st.sampled_from([1, 2, 3, 16]),
    caching=st.booleans(),
)
def test_the_demo(
    demo: tuple[str, Prompts, list[Any]],
    indexes: list[int],
    budget: int,
    num_blocks: int,
    threads: int,
    caching: bool,
) -> None:
    """Any prompts together, in chunks of any size, with room for all or a few, twice over the
    prefix cache.
    """
    numbers, prompts, expected = demo
    threads = threads if own_products(numbers) else 1
    changed = {"num_kv_blocks": num_blocks, "max_num_batched_tokens": budget, **NUMBERS[numbers]}
    with patient_llm(
        "demo", num_threads=threads, enable_prefix_caching=caching, **SMALL | changed
    ) as llm:
        for _ in range(2):
            assert ask(llm, prompts, indexes) == [expected[index] for index in indexes]


@pytest.mark.parametrize("numbers", NUMBERS)
def test_log_probabilities_of_prompts_and_vectors(tmp_path: Path, numbers: str) -> None:
    folder = str(checkpoints.make_text("qwen2", tmp_path))
    rng = np.random.default_rng(7)
    prompts = [" ".join(rng.choice(WORDS, count)) for count in (1, 3, 20, 40, 60)]
    params = [
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=count) for count in range(5)
    ]
    found: list[tuple[Any, Any]] = []
    for changed in ({**ROOMY, "max_num_seqs": 1}, *CHANGED.values()):
        with patient_llm(folder, **NUMBERS[numbers], **changed) as llm:
            outs = llm.generate(prompts, params, use_tqdm=False)
            entries = [
                [
                    at and {i: (e.logprob, e.rank) for i, e in at.items()}
                    for at in out.prompt_logprobs
                ]
                for out in outs
                if out.prompt_logprobs is not None
            ]
        with patient_llm(folder, runner="pooling", **NUMBERS[numbers], **changed) as llm:
            vectors = [out.outputs.embedding for out in llm.embed(prompts, use_tqdm=False)]
        found.append((entries, vectors))
    assert len(found[0][0]) == len(prompts)
    for others in found[1:]:
        assert others == found[0]


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_invariant cannot be had with block_size 8: make"):
        LLM("demo", block_size=8, batch_invariant=True)
    with pytest.raises(ConfigError, match="batch_invariant must be true, false or left out, got 1"):
        LLM("demo", batch_invariant=1)


@pytest.mark.parametrize(
    ("make", "is_told"), [(make_hf_text, True), (checkpoints.make_text, False)]
)
def test_where_it_may_not_hold_is_told_to_those_who_ask_for_it(
    tmp_path: Path, make: Callable[..., Path], is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(make("granite" if is_told else "llama", tmp_path))
    LLM(folder, **ROOMY).close()
    assert "batch_invariant" not in caplog.text
    LLM(folder, batch_invariant=True, **ROOMY).close()
    assert ("batch_invariant: this model runs through the code of" in caplog.text) == is_told


def test_it_is_on_unless_matrix_tiles_would_be_left_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(dtype: torch.dtype, **values: Any) -> bool:
        config = engine_config(model="demo", **values)
        return is_batch_invariant(config, torch.device("cpu"), dtype)

    monkeypatch.setattr(amx, "available", lambda: False)
    assert found(torch.bfloat16)
    monkeypatch.setattr(amx, "available", lambda: True)
    assert not found(torch.bfloat16)
    assert found(torch.bfloat16, batch_invariant=True)
    assert found(torch.bfloat16, kv_cache_dtype="int8")
    assert found(torch.float32)
    assert not found(torch.float32, batch_invariant=False)
    assert not found(torch.float32, block_size=8)
