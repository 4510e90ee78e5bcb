"""A model whose numbers overflow: its own fault or its dtype's, not the request's, and said so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium import LLM, SamplingParams
from sensorium.errors import InvalidRequestError, ModelOutputNotFiniteError
from tests import checkpoints
from tests.models.harness import picture
from tests.reliability.asking import CHAT, Service, image, log_of, serving, text
from tests.reliability.media import picture_url

ROOM: dict[str, Any] = {
    "num_kv_blocks": 100,
    "block_size": 16,
    "max_model_len": 600,
    "dtype": "float16",
}
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
PROMPT = "<|vision_start|><|image_pad|><|vision_end|> what?"
ADVICE = "start with --dtype float32"


def change(folder: Path, part: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Replace the weights of a checkpoint whose names have ``part`` in them."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    names = [name for name in weights if part in name]
    assert names, sorted(weights)
    save_file(weights | {name: by(weights[name]).contiguous() for name in names}, path)
    return folder


def asked(prompt: str = PROMPT) -> dict[str, Any]:
    return {"prompt": prompt, "multi_modal_data": {"image": [picture(60, 90, 0)]}}


def huge(weight: torch.Tensor) -> torch.Tensor:
    return torch.full_like(weight, 3e4)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision tower that overflows in float16, and in no wider type."""
    folder = checkpoints.make_qwen2_vl(tmp_path_factory.mktemp("tower"), dtype="float16")
    return change(folder, "visual.patch_embed", huge)


def test_a_tower_that_overflows_is_named_with_its_dtype_and_item(
    overflowing: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(str(overflowing), **ROOM) as llm:
        with pytest.raises(ModelOutputNotFiniteError) as caught:
            llm.generate([asked()], GREEDY, use_tqdm=False)
        assert caught.value.message == (
            "Prompt 0: The model made no usable numbers of item 0 (image): its embeddings are "
            "infinite or undefined in "
            "float16. Numbers may be too large for this type: start with --dtype float32 (in "
            "Python dtype='float32')."
        )
        assert (caught.value.status, caught.value.code) == (422, "model_output_not_finite")
        [line] = [r.getMessage() for r in caplog.records if "infinite" in r.getMessage()]
        assert line.endswith("item 0 (image): its embeddings are infinite or undefined in float16")
        assert llm.generate(["and text?"], GREEDY, use_tqdm=False)[0].finished
        stats = llm.stats()
        assert (stats.num_unusable, stats.encode_failures, stats.encode_items) == (1, 1, 0)
    with LLM(str(overflowing), **{**ROOM, "dtype": "float32"}) as llm:
        assert llm.generate([asked()], GREEDY, use_tqdm=False)[0].finished, "the advice is good"


def test_the_others_of_a_batch_are_not_harmed(overflowing: Path) -> None:
    with LLM(str(overflowing), **ROOM) as llm:
        [alone] = llm.generate(["one two"], GREEDY, use_tqdm=False)
        with pytest.raises(ModelOutputNotFiniteError) as caught:
            llm.generate(["one two", asked()], GREEDY, use_tqdm=False)
        assert caught.value.index == 1
        assert caught.value.outputs is not None
        assert caught.value.outputs[0].outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize("params", [GREEDY, GREEDY.replace(temperature=1.0, logprobs=2)])
@pytest.mark.parametrize("part", ["lm_head", "model.norm", "layers.0.mlp.down_proj"])
def test_a_decoder_that_overflows(tmp_path: Path, part: str, params: SamplingParams) -> None:
    folder = change(checkpoints.make_text("llama", tmp_path, dtype="float16"), part, huge)
    with LLM(str(folder), **ROOM) as llm:
        with pytest.raises(ModelOutputNotFiniteError, match=f"infinite or undefined.*{ADVICE}"):
            llm.generate(["a b c"], params, use_tqdm=False)
        with pytest.raises(ModelOutputNotFiniteError, match="its logits are infinite"):
            restricted = params.replace(allowed_token_ids=[5, 6], logprobs=None)
            llm.generate(["a b c"], restricted, use_tqdm=False)
        assert llm.stats().num_unusable == 2


def test_prompt_logprobs_of_such_a_decoder(tmp_path: Path) -> None:
    folder = change(checkpoints.make_text("llama", tmp_path, dtype="float16"), "lm_head", huge)
    with LLM(str(folder), max_num_batched_tokens=4, **ROOM) as llm:
        wanted = GREEDY.replace(prompt_logprobs=1)
        with pytest.raises(ModelOutputNotFiniteError, match="its logits are infinite"):
            llm.generate(["a b c d e f g h i j"], wanted, use_tqdm=False)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_all_equal(tmp_path: Path, temperature: float) -> None:
    """As of a head that was never written: no token is likelier than another."""
    folder = change(checkpoints.make_text("llama", tmp_path), "lm_head", torch.zeros_like)
    with (
        LLM(str(folder), **{**ROOM, "dtype": "float32"}) as llm,
        pytest.raises(ModelOutputNotFiniteError) as caught,
    ):
        llm.generate(["a b c"], GREEDY.replace(temperature=temperature), use_tqdm=False)
    assert "its logits are all equal in float32. Its weights may be damaged" in caught.value.message
    assert ADVICE not in caught.value.message


def test_vectors_and_embeddings_given_as_input(tmp_path: Path) -> None:
    folder = checkpoints.make_qwen2_vl(tmp_path, dtype="float16")
    with LLM(str(folder), enable_mm_embeds=True, **ROOM) as llm:
        embeds = {
            "image_embeds": torch.full((6, 64), 1e6),
            "image_grid_thw": torch.tensor([[1, 4, 6]]),
        }
        prompt = {"prompt": PROMPT, "multi_modal_data": {"image": embeds}}
        with pytest.raises(
            ModelOutputNotFiniteError, match=r"item 0 \(image\): the embeddings given as input are"
        ):
            llm.generate([prompt], GREEDY, use_tqdm=False)
    change(folder, "model.norm", huge)
    with (
        LLM(str(folder), runner="pooling", **ROOM) as llm,
        pytest.raises(ModelOutputNotFiniteError, match="its embedding's numbers are infinite"),
    ):
        llm.embed(["a"], use_tqdm=False)


def test_what_is_cached_of_others_is_not_spoilt(tmp_path: Path) -> None:
    """A prompt that overflows in the midst of a chunk, behind a beginning that others have, too."""
    folder = checkpoints.make_text("llama", tmp_path, dtype="float16", num_hidden_layers=4)
    bad = 300
    change(folder, "mlp.down_proj", lambda weight: weight * 300)

    def with_bad_row(table: torch.Tensor) -> torch.Tensor:
        return table.index_fill(0, torch.tensor([bad]), 65_000.0)

    change(folder, "embed_tokens", with_bad_row)
    opening = [20 + index % 200 for index in range(60)]
    spoilt, sound = [*opening, bad, *range(20, 80)], [*opening, 99, *range(20, 80)]
    answers = []
    for first in (None, spoilt):
        with LLM(str(folder), max_num_batched_tokens=64, **ROOM) as llm:
            if first is not None:
                with pytest.raises(ModelOutputNotFiniteError):
                    llm.generate({"prompt_token_ids": first}, GREEDY, use_tqdm=False)
            [out] = llm.generate({"prompt_token_ids": sound}, GREEDY, use_tqdm=False)
            answers.append(out.outputs[0].token_ids)
    assert answers[0] == answers[1]


def test_restrictions_that_leave_nothing_are_still_the_callers(tmp_path: Path) -> None:
    folder = checkpoints.make_text("llama", tmp_path)
    with LLM(str(folder), **ROOM) as llm:
        nothing = GREEDY.replace(allowed_token_ids=[2], stop_token_ids=[2], min_tokens=2)
        with pytest.raises(InvalidRequestError, match="leave no token") as caught:
            llm.generate(["a"], nothing, use_tqdm=False)
        assert (caught.value.status, caught.value.code) == (400, "invalid_request")
        assert llm.stats().num_unusable == 0


@pytest.fixture(scope="module")
def server(overflowing: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    flags = ("--num-kv-blocks", "100", "--block-size", "16", "--max-model-len", "600")
    flags += ("--dtype", "float16")
    with serving(str(overflowing), tmp_path_factory.mktemp("log"), flags) as service:
        yield service


def test_over_http(server: Service) -> None:
    shown = image(picture_url())
    answer = server.ask(shown, text("what?"))
    answer.is_refusal(422, "model_output_not_finite", None)
    assert answer.error["type"] == "model_error"
    assert ADVICE in answer.error["message"]
    messages = [{"role": "user", "content": [shown, text("what?")]}]
    stream = server.post(CHAT, {"messages": messages, "stream": True, "max_tokens": 3})
    assert "model_output_not_finite" in str(stream.body)
    assert server.ask(text("words alone")).status == 200
    assert server.counters()["model_output_not_finite_total"] == 2
    assert (
        log_of(server).count("item 0 (image): its embeddings are infinite or undefined in float16")
        == 2
    )
