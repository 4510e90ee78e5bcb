"""LoRA adapters: tokens of a merged checkpoint, several in one batch, caches that keep apart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM, AsyncLLM, LoRARequest, SamplingParams
from sensorium.engine.prompts.types import MediaOptions, RawPrompt
from sensorium.errors import ConfigError, InvalidRequestError, ModelNotFoundError
from tests import checkpoints
from tests.checkpoints.adapters import linear_names, make_adapter, merged
from tests.e2e.test_invariance import FAMILIES, bits, make_prompts
from tests.parts import Parts, build_llm, build_patient

ROOM = {"num_kv_blocks": 300, "block_size": 16, "max_model_len": 512, "max_num_seqs": 32}
ENABLED = {**ROOM, "enable_lora": True, "dtype": "float32"}
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=2)
NATIVE = sorted(checkpoints.NATIVE)
DORA = ("phi3_v", "qwen2_vl", "ultravox")
ENCODER = r"(?!(.*language_model|llm|model\.layers|lm_head)).*"
"""Names of layers of towers and projectors, in the layouts in which they are published."""


def answers(llm: LLM, prompts: list[Any], lora_request: Any = None) -> list[Any]:
    """Tokens and log-probabilities of each prompt."""
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=lora_request)
    return [bits(output) for output in outputs]


def tokens(found: list[Any]) -> list[list[int]]:
    return [ids for ids, _ in found]


@pytest.mark.parametrize("family", NATIVE)
def test_tokens_are_those_of_a_merged_checkpoint(tmp_path: Path, family: str) -> None:
    """With all layers of decoder, tower and projector adapted, in float32; some by DoRA."""
    make, modality, placeholder = FAMILIES[family]
    base = tmp_path / "base"
    base.mkdir()
    make(base)
    options = {"use_dora": True} if family in DORA else {"use_rslora": True}
    adapter = make_adapter(tmp_path / "adapter", base, strength=0.2, **options)
    whole = merged(tmp_path / "merged", base, adapter)
    prompts = make_prompts(modality, placeholder, 5)
    with build_llm(base, **ENABLED) as parts:
        plain = answers(parts.llm, prompts)
        found = answers(parts.llm, prompts, LoRARequest("a", 1, str(adapter)))
        assert answers(parts.llm, prompts) == plain
    with build_llm(whole, **ROOM, dtype="float32") as parts:
        expected = answers(parts.llm, prompts)
    assert tokens(found) == tokens(expected)
    differing = [one != other for one, other in zip(tokens(found), tokens(plain), strict=True)]
    assert sum(differing) >= 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_text("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    """Adapters of different layers, ranks and patterns."""
    folder = tmp_path_factory.mktemp("adapters")
    options: list[dict[str, Any]] = [
        {"only": r".*\.(q_proj|v_proj)", "rank": 16, "strength": 2.0},
        {"rank": 3, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {r"layers\.1\..*": 4}},
        {"only": r".*(mlp|qkv|q_proj).*", "rank": 40, "use_rslora": True, "use_dora": True},
    ]
    names = "abc"
    return [
        LoRARequest(name, seed, str(make_adapter(folder / name, base, seed=seed, **own)))
        for seed, (name, own) in enumerate(zip(names, options, strict=True))
    ]


@pytest.fixture(scope="module")
def module_parts(base: Path) -> Iterator[Parts]:
    with build_llm(base, **ENABLED, max_loras=3) as parts:
        yield parts


@pytest.fixture
def parts(module_parts: Parts) -> Iterator[Parts]:
    yield module_parts
    module_parts.engine.check_integrity()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16", "max_num_batched_tokens": 23},
        {"dtype": "bfloat16", "quantization": "int8", "num_kv_blocks": 40},
        {"dtype": "bfloat16", "quantization": "int4", "enforce_eager": True},
        {"dtype": "float32", "speculative": "ngram"},
    ],
    ids=["float32", "chunked", "int8-preempted", "int4-eager", "speculative"],
)
def test_three_adapters_in_a_batch_give_what_each_gives_alone(
    base: Path, adapters: list[LoRARequest], options: dict[str, Any]
) -> None:
    """Sixteen prompts, some without an adapter; equal to the bit, in chunks and preempted, too."""
    prompts = make_prompts("", "", 16)
    own = [(None, *adapters)[index % 4] for index in range(16)]
    with build_patient(base, **{**ENABLED, **options}) as parts:
        together = answers(parts.llm, prompts, own)
        preempted = parts.llm.stats().num_preemptions
    with build_llm(base, **{**ENABLED, "dtype": options["dtype"]}, **_format(options)) as parts:
        alone = [
            answers(parts.llm, [prompt], [request])[0]
            for prompt, request in zip(prompts, own, strict=True)
        ]
        plain = answers(parts.llm, prompts)
    assert together == alone
    assert bool(preempted) == (options.get("num_kv_blocks") == 40)
    differing = [a != b for a, b in zip(tokens(together), tokens(plain), strict=True)]
    assert differing == [request is not None for request in own]


def _format(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in options if key == "quantization"}


def test_blocks_of_the_kv_cache_are_those_of_one_adapter(
    parts: Parts, adapters: list[LoRARequest]
) -> None:
    prompt = "one two three four five six seven eight nine ten " * 4
    cached = [
        parts.llm.generate(prompt, GREEDY, False, lora_request=request)[0].num_cached_tokens
        for request in (None, adapters[0], adapters[1], adapters[0], None)
    ]
    assert cached[:3] == [0, 0, 0]
    assert cached[3] == cached[4] > 0


def test_equal_adapters_under_two_names_share(
    parts: Parts, adapters: list[LoRARequest], tmp_path: Path, base: Path
) -> None:
    prompt = "red green blue yellow " * 12
    first = adapters[0]
    twin = LoRARequest("twin", 9, str(make_adapter(
        tmp_path / "twin", base, only=r".*\.(q_proj|v_proj)", rank=16, strength=2.0
    )))  # fmt: skip
    one = parts.llm.generate(prompt, GREEDY, False, lora_request=first)[0]
    other = parts.llm.generate(prompt, GREEDY, False, lora_request=twin)[0]
    assert bits(one) == bits(other)
    assert other.num_cached_tokens > 0


def test_adapters_make_room_for_others(
    parts: Parts, adapters: list[LoRARequest], tmp_path: Path, base: Path
) -> None:
    """Three places: the one used least recently goes, and comes again."""
    before = answers(parts.llm, ["red"], adapters[0])
    more = [
        LoRARequest(f"more {seed}", seed, str(make_adapter(tmp_path / str(seed), base, seed=seed)))
        for seed in range(10, 13)
    ]
    for request in more:
        answers(parts.llm, ["red"], request)
    names = {adapter.name for adapter in parts.engine.facts.adapters}
    assert names == {request.lora_name for request in more}
    assert answers(parts.llm, ["red"], adapters[0]) == before
    with pytest.raises(ConfigError, match="uses 4 adapters, but max_loras is 3"):
        parts.llm.generate(["a"] * 4, GREEDY, False, lora_request=[*more, adapters[0]])


def test_adapters_make_room_where_their_memory_is_bounded(tmp_path: Path, base: Path) -> None:
    """One fits beside another; a third takes the place of the first."""
    requests = [
        LoRARequest(name, seed, str(make_adapter(tmp_path / name, base, rank=64, seed=seed)))
        for seed, name in enumerate("abc")
    ]
    with build_llm(base, **ENABLED, max_lora_memory_gb=0.001, max_lora_rank=512) as parts:
        for request in requests:
            answers(parts.llm, ["red"], request)
        assert [adapter.name for adapter in parts.engine.facts.adapters] == ["b", "c"]
        with pytest.raises(
            ConfigError, match=r"Adapter .a.: It takes .* beside .*--max-lora-memory"
        ):
            answers(parts.llm, ["red"] * 3, [requests[1], requests[2], requests[0]])
        middle = make_adapter(tmp_path / "middle", base, rank=128)
        with pytest.raises(ConfigError, match="beside"):
            answers(parts.llm, ["red"] * 2, [LoRARequest("middle", 9, str(middle)), requests[2]])
        names = [adapter.name for adapter in parts.engine.facts.adapters]
        assert names == ["b", "c"], "forgetting b would not have sufficed"
    large = make_adapter(tmp_path / "large", base, rank=400)
    with build_llm(base, **ENABLED, max_lora_memory_gb=0.001, max_lora_rank=512) as parts:
        answers(parts.llm, ["red"], requests[0])
        with pytest.raises(ConfigError, match="start with a larger --max-lora-memory-gb"):
            answers(parts.llm, ["red"], LoRARequest("large", 9, str(large)))
        names = [adapter.name for adapter in parts.engine.facts.adapters]
        assert names == ["a"], "it would have made no room"


def test_media_are_shared_unless_the_adapter_changes_the_encoder(tmp_path: Path) -> None:
    make, modality, placeholder = FAMILIES["qwen2_vl"]
    base = tmp_path / "base"
    base.mkdir()
    make(base)
    encoder = make_adapter(tmp_path / "encoder", base, only=ENCODER)
    decoder = make_adapter(tmp_path / "decoder", base, only=r"model\.layers.*")
    prompt = next(p for p in make_prompts(modality, placeholder) if "multi_modal_data" in p)
    with build_llm(base, **ENABLED) as parts:
        hits = []
        for request in (None, LoRARequest("d", 1, str(decoder)), LoRARequest("e", 2, str(encoder))):
            answers(parts.llm, [prompt], request)
            stats = parts.llm.stats()
            hits.append((stats.encoder_hits, stats.encode_items))
    num = stats.encode_items // 2
    assert hits == [(0, num), (num, num), (num, 2 * num)]


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (LoRARequest("x"), InvalidRequestError, "give its lora_path"),
        (LoRARequest("x", 1, "/no/such/folder"), ConfigError, "no folder '/no/such"),
        ("x", InvalidRequestError, "must be a LoRARequest"),
        ([None, None], InvalidRequestError, "2 entries for 1 prompt"),
    ],
)
def test_requests_that_cannot_be_had(
    parts: Parts, request_: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        parts.llm.generate("a", GREEDY, False, lora_request=request_)


def test_adapters_must_be_enabled(base: Path, adapters: list[LoRARequest]) -> None:
    with build_llm(base, **ROOM) as parts:
        with pytest.raises(ConfigError, match="enable_lora=True"):
            parts.llm.generate("a", GREEDY, False, lora_request=adapters[0])
        unknown = RawPrompt(text="a", media=MediaOptions(adapter="no such"))
        with pytest.raises(ModelNotFoundError, match="not loaded"):
            parts.run(parts.processor.prepare(unknown))


def test_adapters_of_the_configuration(base: Path, adapters: list[LoRARequest]) -> None:
    modules = {request.lora_name: request.lora_path for request in adapters}
    with build_llm(base, **ENABLED, lora_modules=modules) as parts:
        assert [adapter.rank for adapter in parts.engine.facts.adapters] == [16, 5, 40]
        assert len(answers(parts.llm, ["a"], LoRARequest("b"))) == 1


def test_names_of_layers_are_found(base: Path) -> None:
    assert len(linear_names(base)) == 2 * 7


async def test_an_engine_of_its_own(
    parts: Parts, base: Path, adapters: list[LoRARequest], tmp_path: Path
) -> None:
    """Two adapters and none at once, through the other process; then one goes."""
    first, second, _ = adapters
    prompts, own = ["red", "red", "red"], [first, second, None]
    expected = answers(parts.llm, prompts, own)
    options = {**ENABLED, "num_media_workers": 1, "lora_modules": {"a": first.lora_path}}
    async with AsyncLLM(str(base), **options) as llm:

        async def answer(request: LoRARequest | None) -> Any:
            async for output in llm.generate("red", GREEDY, lora_request=request):
                last = output
            return bits(last)

        assert await asyncio.gather(*map(answer, own)) == expected
        assert await answer(LoRARequest("a")) == expected[0], "its path is known"
        damaged = LoRARequest("d", 3, str(tmp_path))
        with pytest.raises(ConfigError, match=r"Adapter 'd': .*no adapter_config\.json"):
            await answer(damaged)
        with pytest.raises(ConfigError, match=r"Adapter 'd': There is no folder '~/no such'\."):
            await answer(LoRARequest("d", 3, "~/no such"))
        await llm.remove_lora("b")
        with pytest.raises(ModelNotFoundError, match="'b' is not loaded"):
            await answer(LoRARequest("b"))
        await llm.add_lora(second)
        assert await answer(LoRARequest("b")) == expected[1]


def test_nothing_is_loaded_beside_a_stream(
    parts: Parts, adapters: list[LoRARequest], tmp_path: Path, base: Path
) -> None:
    """It would write the tables that a running step reads, or take the stream's adapter away."""
    other = LoRARequest("other", 7, str(make_adapter(tmp_path / "other", base, seed=7)))
    params = [GREEDY, GREEDY.replace(max_tokens=300)]
    options: dict[str, Any] = {"use_tqdm": False, "lora_request": adapters[0]}
    stream = parts.llm.generate(["red", "green"], params, stream=True, **options)
    next(stream)
    stats = parts.llm.stats()
    assert (stats.max_loras, stats.running_adapters, stats.waiting_adapters) == (3, ["a"], [])
    assert 0 < stats.lora_num_bytes < stats.lora_capacity_bytes
    before = parts.engine.facts.adapters
    with pytest.raises(InvalidRequestError, match="middle of another call"):
        answers(parts.llm, ["red"], other)
    assert parts.engine.facts.adapters == before
    stream.close()
    assert len(answers(parts.llm, ["red"], other)) == 1
