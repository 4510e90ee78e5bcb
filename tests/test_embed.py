"""Vectors equal a plain computation with ``transformers``.

Text, pictures and both, however the work is cut up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sensorium import LLM, EmbeddingRequestOutput, PoolingParams, SamplingParams
from sensorium.errors import (
    ConfigError,
    InvalidRequestError,
    ModelOutputNotFiniteError,
    PromptTooLongError,
    SensoriumError,
)
from tests import checkpoints
from tests.checkpoints.hf import make_hf_text
from tests.e2e.prompts import MixedPrompt, mixed_prompts, qwen2_vl_inputs
from tests.parts import Parts, build_llm

TEMPLATE = Path(__file__).parents[1] / "examples" / "templates" / "dse_qwen2_vl.jinja"
TOLERANCE = 1e-4
ROOM: dict[str, Any] = {"num_kv_blocks": 200, "block_size": 16, "max_model_len": 512}
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
)
TEXTS = ("How many birds?", "a", "The quick brown fox jumps over the lazy dog " * 3, "How many")


@dataclass(frozen=True)
class Dse:
    """A checkpoint of DSE-Qwen2's kind, prompts, and the reference's hidden states at their last
    tokens.
    """

    folder: Path
    prompts: list[MixedPrompt]
    hidden: list[torch.Tensor]


@pytest.fixture(scope="module")
def dse(tmp_path_factory: pytest.TempPathFactory) -> Dse:
    folder = checkpoints.make_qwen2_vl(tmp_path_factory.mktemp("dse"))
    prompts = mixed_prompts(12, VISION, chat=CHAT)
    return Dse(folder, prompts, reference_states(folder, prompts))


def reference_states(folder: Path, prompts: Sequence[MixedPrompt]) -> list[torch.Tensor]:
    """(H,) float32 of each prompt: the last hidden state after the final norm."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for values in qwen2_vl_inputs(folder, list(prompts)):
        values = {"attention_mask": torch.ones_like(values["input_ids"]), **values}
        with torch.inference_mode():
            found.append(model.model(**values).last_hidden_state[0, -1])
    return found


def expected(hidden: torch.Tensor, dimensions: int | None = None) -> np.ndarray:
    """Cut first, then normalised."""
    return F.normalize(hidden[:dimensions], dim=-1).numpy()


def asked(prompts: Sequence[MixedPrompt]) -> list[dict[str, Any]]:
    return [
        {"prompt": p.text, "multi_modal_data": {"image": p.images} if p.images else {}}
        for p in prompts
    ]


def vectors(outputs: Sequence[EmbeddingRequestOutput]) -> np.ndarray:
    return np.array([output.outputs.embedding for output in outputs])


SETTINGS: dict[str, dict[str, Any]] = {
    "together": {},
    "alone": {"max_num_seqs": 1, "enable_prefix_caching": False},
    "chunked": {"max_num_batched_tokens": 7, "block_size": 8, "num_kv_blocks": 400},
    "tight": {"num_kv_blocks": 32, "max_num_batched_tokens": 50, "mm_encoder_cache_gb": 0.001},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_vectors_of_texts_and_pictures(dse: Dse, setting: str) -> None:
    wanted = np.array([expected(hidden) for hidden in dse.hidden])
    with LLM(str(dse.folder), runner="pooling", **{**ROOM, **SETTINGS[setting]}) as llm:
        outputs = llm.embed(asked(dse.prompts), use_tqdm=False)
        np.testing.assert_allclose(vectors(outputs), wanted, atol=TOLERANCE)
        again = llm.embed(asked(dse.prompts), use_tqdm=False)
        np.testing.assert_allclose(vectors(again), wanted, atol=TOLERANCE)
        stats = llm.stats()
    assert len({tuple(row.round(3)) for row in wanted}) == len(wanted), "vectors must vary"
    assert (stats.kv_blocks_used, stats.held_features, stats.generation_tokens) == (0, 0, 0)
    assert stats.num_embeddings == 2 * len(wanted)
    if setting == "together":
        assert all(new.num_cached_tokens > 0 for new in again if len(new.prompt_token_ids) > 16)
        assert all(new.num_cached_tokens < len(new.prompt_token_ids) for new in again)


@pytest.fixture(scope="module")
def parts(dse: Dse) -> Iterator[Parts]:
    with build_llm(
        dse.folder,
        runner="pooling",
        chat_template=str(TEMPLATE),
        hf_overrides={"is_matryoshka": True},
        enable_mm_embeds=True,
        **ROOM,
    ) as parts:
        yield parts


@pytest.fixture(scope="module")
def llm(parts: Parts) -> LLM:
    return parts.llm


def test_cut_first_then_normalised(llm: LLM, dse: Dse) -> None:
    prompts, hidden = asked(dse.prompts[:3]), dse.hidden[:3]
    params = [PoolingParams(dimensions=16), PoolingParams(dimensions=64), PoolingParams()]
    outputs = llm.embed(prompts, pooling_params=params, use_tqdm=False)
    for output, one, state in zip(outputs, params, hidden, strict=True):
        found = np.array(output.outputs.embedding)
        np.testing.assert_allclose(found, expected(state, one.dimensions), atol=TOLERANCE)
        assert output.outputs.hidden_size == (one.dimensions or 64)
        assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-6)
    raw = PoolingParams(dimensions=5, normalize=False)
    [output] = llm.embed(prompts[0], pooling_params=raw, use_tqdm=False)
    np.testing.assert_allclose(output.outputs.embedding, hidden[0][:5], atol=TOLERANCE)


def test_scores_are_cosines(llm: LLM, dse: Dse) -> None:
    prompts = asked(dse.prompts[:4])
    cut = [expected(hidden, 16) for hidden in dse.hidden[:4]]
    params = PoolingParams(dimensions=16)
    ones = llm.score(prompts[0], prompts[1:], pooling_params=params, use_tqdm=False)
    wanted = [float(cut[0] @ other) for other in cut[1:]]
    assert [output.outputs.score for output in ones] == pytest.approx(wanted, abs=TOLERANCE)
    pairs = llm.score(prompts[:2], prompts[2:], pooling_params=params, use_tqdm=False)
    wanted = [float(a @ b) for a, b in zip(cut[:2], cut[2:], strict=True)]
    assert [output.outputs.score for output in pairs] == pytest.approx(wanted, abs=TOLERANCE)
    for bad in (([], "a"), (["a", "b"], "c"), (["a", "b"], ["c"] * 3), ("a", [])):
        with pytest.raises(InvalidRequestError, match="prompts to compare"):
            llm.score(*bad, use_tqdm=False)


def test_conversations_are_rendered_by_the_template(llm: LLM, dse: Dse) -> None:
    image = next(prompt.images[0] for prompt in dse.prompts if prompt.images)
    parts: list[Any] = [
        {"type": "image_pil", "image_pil": image},
        {"type": "text", "text": "What is shown in this image?"},
    ]
    [output] = llm.embed({"messages": [{"role": "user", "content": parts}]}, use_tqdm=False)
    text = CHAT[0] + VISION + "What is shown in this image?" + CHAT[1]
    assert output.prompt == text
    [hidden] = reference_states(dse.folder, [MixedPrompt(text, [image])])
    np.testing.assert_allclose(output.outputs.embedding, expected(hidden), atol=TOLERANCE)
    [plain] = llm.embed([{"prompt": text, "multi_modal_data": {"image": image}}], use_tqdm=False)
    np.testing.assert_allclose(plain.outputs.embedding, output.outputs.embedding, atol=1e-6)


def test_what_comes_with_a_vector(llm: LLM, dse: Dse) -> None:
    prompt = next(p for p in asked(dse.prompts) if p["multi_modal_data"])
    [output] = llm.embed(prompt, use_tqdm=False)
    assert output.finished
    assert output.usage.prompt_tokens == output.usage.total_tokens == len(output.prompt_token_ids)
    assert output.usage.cached_tokens == output.num_cached_tokens
    assert output.num_item_tokens["image"] > 0
    assert output.metrics is not None
    assert output.metrics.finished_time is not None
    [encoded] = llm.encode(prompt, PoolingParams(dimensions=8), use_tqdm=False)
    assert encoded.outputs.data.shape == (8,)
    assert encoded.outputs.data.dtype == torch.float32
    assert output.outputs.embedding != encoded.outputs.data.tolist()


def test_forms_of_a_text_are_one_text(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("How many birds?")
    forms = ["How many birds?", {"prompt": "How many birds?"}, ids, {"prompt_token_ids": ids}]
    found = vectors(llm.embed(forms, use_tqdm=False))
    np.testing.assert_allclose(found[1:], found[:-1], atol=1e-6)
    assert vectors(llm.embed(ids, use_tqdm=False)).shape == (1, 64)


def test_wrong_calls_are_refused_before_anything_runs(llm: LLM) -> None:
    steps = llm.stats().num_steps
    wrong: list[tuple[Any, Any, str]] = [
        (["a"], PoolingParams(dimensions=65), "embeddings have 64"),
        (["a"], [PoolingParams()] * 2, "pooling_params has 2 entries for 1 prompt"),
        (["a"], SamplingParams(), "must be a PoolingParams"),
        (["a"], [SamplingParams()], r"pooling_params\[0\] must be"),
        (["a", [1, 10**6]], None, "Prompt 1: Token id 1000000"),
        (["a", {"messages": [{"role": "user", "content": "x"}], "tools": []}], None, "Prompt 1: .*'tools'"),
        ({"messages": [], "add_generation_prompt": 1}, None, "must be true or false, got 1"),
        ({"messages": [{"role": "user", "content": ""}], "chat_template": "{{ messages[0].content }}"},
         None, "prompt is empty"),
        ({"prompt": ""}, None, "prompt is empty"),
        (["a " * 600], None, "maximum context length is 512 tokens. However, the prompt has"),
    ]  # fmt: skip
    for prompts, params, message in wrong:
        with pytest.raises(SensoriumError, match=message):
            llm.embed(prompts, pooling_params=params, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="pooling_task must be 'embed', got 'classify'"):
        llm.encode("a", pooling_task="classify")
    for call in (llm.generate, lambda prompt: llm.chat([{"role": "user", "content": prompt}])):
        with pytest.raises(
            InvalidRequestError, match="returns embeddings here and generates no text"
        ):
            call("a")
    assert llm.stats().num_steps == steps


def test_a_prompt_may_fill_the_whole_context(llm: LLM) -> None:
    ids = [5] * 512
    [output] = llm.embed([ids], use_tqdm=False)
    assert len(output.outputs.embedding) == 64
    with pytest.raises(PromptTooLongError):
        llm.embed([[5] * 513], use_tqdm=False)


@pytest.mark.parametrize("block_size", [8, 16])
def test_a_vector_that_is_not_finite_fails_alone(
    dse: Dse, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    """Neither its neighbours in a step nor those that get its blocks afterwards are harmed."""
    with build_llm(dse.folder, runner="pooling", **{**ROOM, "block_size": block_size}) as parts:
        llm, model = parts.llm, parts.runner.model
        embed = model.embed

        def poisoned(ids: torch.Tensor) -> torch.Tensor:
            rows = embed(ids)
            rows[ids == 333] = torch.nan
            return rows

        alone = vectors(llm.embed([[5, 6], [7], [8]], use_tqdm=False))
        monkeypatch.setattr(model, "embed", poisoned)
        with pytest.raises(ModelOutputNotFiniteError, match=r"Prompt 1: .* infinite or undefined"):
            llm.embed([[5, 6], [333, 6], [7]], use_tqdm=False)
        found = vectors(llm.embed([[5, 6], [7], [8]], use_tqdm=False))
    np.testing.assert_allclose(found, alone, atol=1e-6)


def test_a_span_that_breaks_the_step_fails_alone(
    llm: LLM, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parts.runner.model
    embed = model.embed

    def broken(ids: torch.Tensor) -> torch.Tensor:
        if (ids == 333).any():
            raise RuntimeError("broken")
        return embed(ids)

    monkeypatch.setattr(model, "embed", broken)
    with pytest.raises(SensoriumError, match="Prompt 1: The model could not compute this request"):
        llm.embed([[5, 6, 9], [333, 6]], use_tqdm=False)


def test_a_generating_model_makes_no_vectors_and_can_be_converted(dse: Dse) -> None:
    with build_llm(dse.folder, **ROOM) as parts:
        with pytest.raises(InvalidRequestError, match="runner='pooling'"):
            parts.llm.embed("a")
        assert parts.runner.model.decoder.head.linear.weight is not None  # type: ignore[attr-defined]
    with build_llm(dse.folder, convert="embed", **ROOM) as parts:
        llm = parts.llm
        assert len(llm.embed("a", use_tqdm=False)[0].outputs.embedding) == 64
        assert parts.runner.model.decoder.head.linear.weight is None  # type: ignore[attr-defined]
        with pytest.raises(InvalidRequestError, match="is_matryoshka"):
            llm.embed("a", pooling_params=PoolingParams(dimensions=8))
    with pytest.warns(DeprecationWarning, match="runner='pooling'"):
        llm = LLM(str(dse.folder), task="embed", **ROOM)
    assert llm.config.model.runner == "pooling"
    llm.close()


def text_states(folder: Path) -> list[torch.Tensor]:
    """The reference's last hidden states of ``TEXTS``."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in TEXTS:
        with torch.inference_mode():
            values = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            found.append(model(**values).last_hidden_state[0, -1])
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("batched_tokens", [5, 512])
def test_text_embedders(tmp_path: Path, family: str, batched_tokens: int) -> None:
    folder = checkpoints.make_embedder(family, tmp_path)
    with LLM(str(folder), max_num_batched_tokens=batched_tokens, **ROOM) as llm:
        found = vectors(llm.embed(list(TEXTS), use_tqdm=False))
    wanted = np.array([expected(state) for state in text_states(folder)])
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_a_model_that_runs_by_its_own_modelling_code(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_hf_text("gemma2", tmp_path)
    ids = [5, 6, 7, 8, 9, 10]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    with LLM(str(folder), runner="pooling", **ROOM) as llm:
        [output] = llm.embed([ids], use_tqdm=False)
    np.testing.assert_allclose(output.outputs.embedding, expected(states[0, -1]), atol=TOLERANCE)


def test_what_the_folder_says_of_normalising_and_cutting(tmp_path: Path) -> None:
    steps = ("Transformer", "Pooling")
    folder = checkpoints.make_embedder(
        "qwen3", tmp_path, steps=steps, matryoshka_dimensions=[16, 32]
    )
    wanted = text_states(folder)[0]
    with LLM(str(folder), **ROOM) as llm:
        [plain] = llm.embed(TEXTS[0], use_tqdm=False)
        np.testing.assert_allclose(plain.outputs.embedding, wanted, atol=TOLERANCE)
        params = PoolingParams(dimensions=16, normalize=True)
        [cut] = llm.embed(TEXTS[0], pooling_params=params, use_tqdm=False)
        np.testing.assert_allclose(cut.outputs.embedding, expected(wanted, 16), atol=TOLERANCE)
        with pytest.raises(InvalidRequestError, match="cut to 16, 32 only"):
            llm.embed("a", pooling_params=PoolingParams(dimensions=17))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "mean_tokens"}, "pools by mean_tokens; only pooling of the last token"),
        ({"steps": ("Transformer", "Pooling", "Dense")}, "the step 'Dense'"),
        ({"is_causal": False}, "is_causal is false"),
        ({"matryoshka_dimensions": [0]}, r"list of positive integers, got \[0\]"),
    ],
)
def test_embedders_that_cannot_be_run_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = checkpoints.make_embedder("llama", tmp_path, **options)
    with pytest.raises(ConfigError, match=message):
        LLM(str(folder), **ROOM)


def test_a_checkpoint_without_a_head_needs_no_modules(tmp_path: Path) -> None:
    folder = checkpoints.make_embedder("llama", tmp_path, steps=None)
    with LLM(str(folder), **ROOM) as llm:
        vector = llm.embed(TEXTS[0], use_tqdm=False)[0].outputs.embedding
    np.testing.assert_allclose(vector, expected(text_states(folder)[0]), atol=TOLERANCE)
    with pytest.raises(ConfigError, match="lm_head"):
        LLM(str(folder), runner="generate", **ROOM)


def test_half_precision_is_close_and_normalised_in_float32(tmp_path: Path) -> None:
    folder = checkpoints.make_embedder("qwen2", tmp_path)
    with LLM(str(folder), dtype="bfloat16", **ROOM) as llm:
        found = vectors(llm.embed(list(TEXTS), use_tqdm=False))
    wanted = np.array([expected(state) for state in text_states(folder)])
    assert ((found * wanted).sum(-1) > 0.99).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, atol=1e-6)


def test_embeddings_stand_for_pictures(llm: LLM, parts: Parts, dse: Dse) -> None:
    prompt = next(p for p in asked(dse.prompts) if p["multi_modal_data"])
    prepared = parts.prepare(prompt)
    with torch.inference_mode():
        encoded = parts.runner.model.encode([i.features for i in prepared.items])
    grids = torch.tensor([list(item.features.meta["grid"]) for item in prepared.items])
    data = {"image_embeds": torch.cat(encoded), "image_grid_thw": grids}
    embeds = {"prompt": prompt["prompt"], "multi_modal_data": {"image": data}}
    found = vectors(llm.embed([prompt, embeds], use_tqdm=False))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_a_picture_alone(llm: LLM, dse: Dse) -> None:
    image = Image.fromarray(np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3))
    text = CHAT[0] + VISION + CHAT[1]
    [hidden] = reference_states(dse.folder, [MixedPrompt(text, [image])])
    prompt = {"prompt": text, "multi_modal_data": {"image": image}}
    [output] = llm.embed(prompt, use_tqdm=False)
    np.testing.assert_allclose(output.outputs.embedding, expected(hidden), atol=TOLERANCE)
