"""Long contexts: rotary factors by each request's own length, and contexts as long as the
scaling makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sensorium import LLM, SamplingParams
from sensorium.errors import ConfigError
from sensorium.models.rope import placed_alike
from tests.checkpoints import (
    make_llava,
    make_llava_onevision,
    make_phi3_v,
    make_qwen3_vl,
    make_text,
)
from tests.models.plain_phi3_v import PlainPhi3V
from tests.parts import build_llm

BORDER = 24
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0],
    "long_factor": [9.0, 7.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0],
}
ROOM: dict[str, Any] = {"num_kv_blocks": 100, "block_size": 16}
ENDING = (BORDER - 8, 8)
"""Tokens of a prompt, and of its answer, that end at the border together."""
CROSSING = (BORDER - 8, 9)
BEYOND = (BORDER + 5, 8)


def ids(num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 400, num_tokens).tolist()


def greedy(max_tokens: int | None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def raw(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


class Phi3:
    """``transformers``' Phi-3, whose factors can be pinned to those of long sequences."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.rotary = self.model.model.rotary_emb
        self.short = self.rotary.original_inv_freq.clone()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_tokens: int, *, long: bool) -> list[int]:
        """The continuation with one set of factors from start to end, by whole passes."""
        known = list(prompt)
        for _ in range(num_tokens):
            hidden = self._states(known, long)[-1:]
            known.append(int(self.model.lm_head(hidden).argmax()))
        return known[len(prompt) :]

    @torch.inference_mode()
    def published(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What its ``generate`` makes, which changes the factors at the border."""
        self.rotary.original_inv_freq = self.short
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        out = self.model.generate(
            torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False
        )
        return list(out[0, len(prompt) :].tolist())

    @torch.inference_mode()
    def vector(self, prompt: list[int]) -> np.ndarray:
        states = self._states(prompt, len(prompt) > BORDER)
        return F.normalize(states[-1], dim=-1).numpy()

    def _states(self, known: list[int], long: bool) -> torch.Tensor:
        factors = torch.tensor(LONGROPE["long_factor"])
        exponent = torch.arange(0, 16, 2, dtype=torch.float32) / 16
        inverse = 1.0 / (factors * self.model.config.rope_parameters["rope_theta"] ** exponent)
        self.rotary.original_inv_freq = inverse if long else self.short
        states: torch.Tensor = self.model.model(torch.tensor([known]), use_cache=False)[0]
        return states[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(
        "phi3",
        tmp_path_factory.mktemp("phi3"),
        rope_scaling=LONGROPE,
        original_max_position_embeddings=BORDER,
        hidden_size=64,
        num_attention_heads=4,
    )


@pytest.fixture(scope="module")
def phi3(folder: Path) -> Phi3:
    return Phi3(folder)


@pytest.fixture(params=[{}, {"max_num_batched_tokens": 7}], ids=["whole", "chunked"])
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(str(folder), **ROOM, **request.param) as llm:
        yield llm


def test_each_request_has_the_factors_of_its_own_final_length_in_one_batch(
    llm: LLM, phi3: Phi3
) -> None:
    cases = [ENDING, CROSSING, BEYOND, (5, 4), (BORDER, 3)]
    prompts = [ids(num_prompt, seed) for seed, (num_prompt, _) in enumerate(cases)]
    expected = [
        phi3.greedy(prompt, num, long=len(prompt) + num > BORDER)
        for prompt, (_, num) in zip(prompts, cases, strict=True)
    ]
    params = [greedy(num) for _, num in cases]
    outputs = llm.generate(raw(prompts), params, use_tqdm=False)
    assert [out.outputs[0].token_ids for out in outputs] == expected
    again = llm.generate(raw(prompts[::-1]), params[::-1], use_tqdm=False)
    assert [out.outputs[0].token_ids for out in again] == expected[::-1]


def test_the_two_sets_give_different_answers_here(phi3: Phi3) -> None:
    """What the tests around this one tell apart is there to be told apart."""
    prompt = ids(ENDING[0])
    assert phi3.greedy(prompt, 8, long=False) != phi3.greedy(prompt, 8, long=True)


def test_the_prefix_cache_keeps_the_sets_apart(llm: LLM, phi3: Phi3) -> None:
    prompt = ids(17, seed=3)
    found = []
    for num_tokens in (7, 8, 7, 8):
        [out] = llm.generate(raw([prompt]), greedy(num_tokens), use_tqdm=False)
        found.append(out.num_cached_tokens)
        long = 17 + num_tokens > BORDER
        assert out.outputs[0].token_ids == phi3.greedy(prompt, num_tokens, long=long)
    assert found == [0, 0, 16, 16]


def test_an_answer_without_max_tokens_changes_the_set_at_the_border_as_published(
    folder: Path, phi3: Phi3
) -> None:
    """Nobody knows how long it gets.

    It begins short, and is computed again when it has outgrown the border.
    """
    prompts = [ids(BORDER - 6, 1), ids(BORDER, 2), ids(BORDER + 1, 3)]
    with LLM(str(folder), max_model_len=BORDER + 12, **ROOM) as llm:
        outputs = llm.generate(raw(prompts), greedy(None), use_tqdm=False)
        assert llm.stats().num_preemptions == 0
    for out, prompt in zip(outputs, prompts, strict=True):
        num_tokens = BORDER + 12 - len(prompt)
        assert out.outputs[0].finish_reason == "length"
        assert out.outputs[0].token_ids == phi3.published(prompt, num_tokens)


def test_a_context_of_the_original_length_has_short_factors_only(folder: Path, phi3: Phi3) -> None:
    prompt = ids(BORDER - 5)
    with LLM(str(folder), max_model_len=BORDER, **ROOM) as llm:
        [out] = llm.generate(raw([prompt]), greedy(None), use_tqdm=False)
    assert out.outputs[0].token_ids == phi3.greedy(prompt, 5, long=False)


def test_vectors_have_the_factors_of_their_prompts(folder: Path, phi3: Phi3) -> None:
    prompts = [ids(BORDER, 1), ids(BORDER + 1, 1), ids(7, 2)]
    with LLM(str(folder), runner="pooling", **ROOM) as llm:
        outputs = llm.embed(raw(prompts), use_tqdm=False)
    for out, prompt in zip(outputs, prompts, strict=True):
        np.testing.assert_allclose(out.outputs.embedding, phi3.vector(prompt), atol=1e-5)


@pytest.mark.parametrize("runner", ["generate", "pooling"])
def test_phi3_vision_and_vlm2vec_on_both_sides_of_the_border(tmp_path: Path, runner: str) -> None:
    folder = make_phi3_v(tmp_path, original_max_position_embeddings=BORDER)
    plain = PlainPhi3V(folder)
    texts = ["<|user|>\nWhy?", "<|user|>\nHow many birds sit on that long, long branch up there?"]
    known = [plain.ids(text, []) for text in texts]
    assert len(known[0]) + 4 <= BORDER < len(known[1])
    with LLM(str(folder), runner=runner, **ROOM) as llm:
        if runner == "generate":
            outputs = llm.generate(texts, greedy(4), use_tqdm=False)
            expected = [plain.greedy(text, [], 4) for text in texts]
            assert [out.outputs[0].token_ids for out in outputs] == expected
            return
        vectors = [out.outputs.embedding for out in llm.embed(texts, use_tqdm=False)]
    with torch.inference_mode():
        for prompt, vector in zip(known, vectors, strict=True):
            states = plain.model.model(torch.tensor([prompt]), use_cache=False)[0]
            theirs = F.normalize(states[0, -1], dim=-1).numpy()
            np.testing.assert_allclose(vector, theirs, atol=1e-4)


DECLARED = 64
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": DECLARED},
    "yarn-plain": {"type": "yarn", "factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 4},
    "dynamic": {"type": "dynamic", "factor": 4.0},
}


def reference_token(folder: Path, prompt: list[int], rope: dict[str, Any]) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    theta = config.rope_parameters["rope_theta"]
    kind = rope.get("rope_type") or rope["type"]
    config.rope_parameters = {**rope, "rope_type": kind, "rope_theta": theta}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    with torch.inference_mode():
        return int(model.eval()(torch.tensor([prompt])).logits[0, -1].argmax())


@pytest.mark.parametrize("how", ["file", "newer file", "overrides"])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_lengthens_the_context(tmp_path: Path, name: str, how: str) -> None:
    """As the model cards say: ``max_position_embeddings`` stays, the context is factor x original."""
    sizes: dict[str, Any] = {"max_position_embeddings": DECLARED}
    options: dict[str, Any] = {}
    if how == "file":
        sizes["rope_scaling"] = SCALINGS[name]
    else:
        options["hf_overrides"] = {"rope_scaling": SCALINGS[name]}
    folder = make_text("qwen2", tmp_path, layout="t5" if how == "newer file" else "hub", **sizes)
    prompts = [ids(230, seed) for seed in (1, 2)] + [ids(9)]
    with build_llm(folder, num_kv_blocks=100, block_size=16, **options) as parts:
        assert parts.engine.facts.max_model_len == 4 * DECLARED
        # Dynamic scaling is that of the final length: of a prompt and one token here, of the prompt
        # in the reference.
        last = [1 if name == "dynamic" else 3] * 3
        params = [greedy(num) for num in last]
        outputs = parts.llm.generate(raw(prompts), params, use_tqdm=False)
    found = [out.outputs[0].token_ids[0] for out in outputs]
    assert found == [reference_token(folder, prompt, SCALINGS[name]) for prompt in prompts]


def test_max_model_len_goes_up_to_the_lengthened_context(tmp_path: Path) -> None:
    folder = make_text("qwen3", tmp_path, max_position_embeddings=DECLARED)
    longer = {"hf_overrides": {"rope_scaling": SCALINGS["yarn"]}, **ROOM}
    with LLM(str(folder), max_model_len=200, **longer) as llm:
        [out] = llm.generate(raw([ids(190)]), greedy(None), use_tqdm=False)
    assert len(out.outputs[0].token_ids) == 10
    with pytest.raises(
        ConfigError, match="max_model_len is 257, but the model's context ends at 256"
    ):
        LLM(str(folder), max_model_len=257, **longer)
    with pytest.raises(ConfigError, match="context ends at 64"):
        LLM(str(folder), max_model_len=65, **ROOM)


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2", "qwen3"])
def test_contexts_go_on_behind_a_sliding_window(tmp_path: Path, family: str) -> None:
    """As Phi-3-mini-4k (2047 of 4096) and Mistral 7B v0.1 (4096 of 32768) are published."""
    sizes: dict[str, Any] = {"sliding_window": 27, "max_position_embeddings": 400}
    if family.startswith("qwen"):
        sizes |= {"use_sliding_window": True, "max_window_layers": 1}
    folder = make_text(family, tmp_path, original_max_position_embeddings=400, **sizes)
    prompts = [ids(length, seed) for seed, length in enumerate((20, 27, 90, 330))]
    found = []
    for budget in (40, 2048):
        with LLM(str(folder), max_num_batched_tokens=budget, **ROOM) as llm:
            outs = llm.generate(raw(prompts), greedy(12), use_tqdm=False)
            found.append([out.outputs[0].token_ids for out in outs])
    expected = [greedy_of_transformers(folder, prompt, 12) for prompt in prompts]
    assert found == [expected, expected]


def greedy_of_transformers(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """The continuation by whole passes, without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    known = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(prompt) :]


@pytest.mark.parametrize("factor", [0, -4, "4", True, float("nan")])
def test_factors_that_are_no_factors_are_named(tmp_path: Path, factor: Any) -> None:
    folder = make_text("llama", tmp_path)
    overrides = {"rope_scaling": {"type": "yarn", "factor": factor}}
    with pytest.raises(ConfigError, match=r"rope_scaling.factor must be a number of at least 1"):
        LLM(str(folder), hf_overrides=overrides, **ROOM)


def test_an_older_name_in_the_overrides_counts_over_a_newer_one_in_the_file(tmp_path: Path) -> None:
    scaling = {"rope_type": "default", "type": "default"}
    folder = make_text("qwen2", tmp_path, max_position_embeddings=DECLARED, rope_scaling=scaling)
    overrides = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    with LLM(str(folder), hf_overrides=overrides, max_model_len=2 * DECLARED, **ROOM) as llm:
        [out] = llm.generate(raw([ids(100)]), greedy(1), use_tqdm=False)
    theirs = reference_token(folder, ids(100), {"rope_type": "linear", "factor": 2.0})
    assert out.outputs[0].token_ids == [theirs]


@pytest.mark.parametrize("make", [make_llava, make_llava_onevision, make_qwen3_vl])
def test_overrides_reach_a_decoder_within_a_text_config(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    """Flags and model cards name ``rope_scaling`` at the top, wherever the file has the decoder."""
    folder, scaling = make(tmp_path), SCALINGS["yarn"]
    edit_config(folder, {"max_position_embeddings": DECLARED})
    texts = [[30 + token % 100 for token in ids(length)] for length in (230, 50)]
    prompts, options = raw(texts), {"dtype": "float32", **ROOM}

    def answers(**more: Any) -> list[list[int]]:
        with build_llm(folder, **options, **more) as parts:
            assert parts.engine.facts.max_model_len == 4 * DECLARED
            outputs = parts.llm.generate(prompts, greedy(6), use_tqdm=False)
            return [out.outputs[0].token_ids for out in outputs]

    overridden = answers(hf_overrides={"rope_scaling": scaling})
    edit_config(folder, scaling, "rope_scaling")
    assert answers() == overridden


def edit_config(folder: Path, values: dict[str, Any], *inside: str) -> None:
    """Set values of the decoder in config.json, or of a mapping within, whichever of its names
    is there.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part = config["text_config"]
    for name in inside:
        part = part.get("rope_parameters") or part.setdefault(name, {})
    part |= values
    path.write_text(json.dumps(config))


def test_overrides_within_a_text_config_count_as_they_are() -> None:
    file = {"max_position_embeddings": 9, "text_config": {"rope_parameters": {"rope_theta": 5.0}}}
    top = {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 7}
    assert placed_alike(file, {**top, "text_config": {"max_position_embeddings": 8}}) == {
        "max_position_embeddings": 7,
        "text_config": {
            "rope_parameters": {"type": "linear", "factor": 2.0, "rope_type": "linear"},
            "max_position_embeddings": 8,
        },
    }
    assert placed_alike({"vocab_size": 3}, top) == top
    assert placed_alike(file, {"vocab_size": 3}) == {"vocab_size": 3}
