"""The offline API on tiny checkpoints: what goes in, what comes out, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.engine.prompts.types import RawPrompt
from sensorium.errors import (
    ConfigError,
    InvalidEmbeddingsError,
    InvalidRequestError,
    MediaNotCachedError,
    MediaRefusedError,
    PlaceholderMismatchError,
    PromptTooLongError,
    SensoriumError,
    TooManyItemsError,
    UnsupportedModalityError,
)
from tests import checkpoints
from tests.parts import Parts, build_llm

ROOM = {"num_kv_blocks": 400, "block_size": 16, "max_model_len": 512}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    checkpoints.make_qwen2_vl(folder)
    return folder


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    checkpoints.make_llava(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_parts(qwen_folder: Path) -> Iterator[Parts]:
    with build_llm(qwen_folder, enable_mm_embeds=True, **ROOM) as parts:
        yield parts


@pytest.fixture(scope="module")
def qwen(qwen_parts: Parts) -> LLM:
    return qwen_parts.llm


@pytest.fixture(scope="module")
def llava_parts(llava_folder: Path) -> Iterator[Parts]:
    with build_llm(llava_folder, enable_mm_embeds=True, **ROOM) as parts:
        yield parts


@pytest.fixture(scope="module")
def llava(llava_parts: Parts) -> LLM:
    return llava_parts.llm


def picture(seed: int = 0, size: tuple[int, int] = (60, 45)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def ask(llm: LLM, prompt: object, params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids


def seen(images: object, prompt: str = f"{VISION}what") -> dict[str, Any]:
    return {"prompt": prompt, "multi_modal_data": {"image": images}}


def test_outputs_come_in_the_order_of_the_prompts(qwen: LLM) -> None:
    prompts: list[Any] = ["one", seen(picture()), [5, 6, 7], {"prompt_token_ids": [8, 9]}]
    outputs = qwen.generate(prompts, GREEDY, use_tqdm=False)
    assert [out.prompt for out in outputs] == ["one", f"{VISION}what", None, None]
    assert [out.outputs[0].token_ids for out in outputs] == [ask(qwen, [p])[:] for p in prompts]
    assert all(out.finished and out.outputs[0].finish_reason == "length" for out in outputs)
    assert outputs[1].num_item_tokens == {"image": 4}


def test_one_prompt_may_stand_without_a_list(qwen: LLM) -> None:
    assert ask(qwen, "one") == ask(qwen, ["one"])
    assert ask(qwen, [5, 6, 7]) == ask(qwen, [[5, 6, 7]])


def test_forms_of_an_image_are_one_image(qwen: LLM, llava: LLM) -> None:
    image = picture()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for llm, prompt in ((qwen, f"{VISION}what"), (llava, "<image> what")):
        answers = [ask(llm, seen(form, prompt)) for form in (image, array, tensor, [image])]
        assert answers[1:] == answers[:-1]
        assert answers[0] != ask(llm, seen(picture(1), prompt)), "the picture matters"


def test_a_prompt_with_placeholders_in_full_length_is_taken_as_it_stands(llava: LLM) -> None:
    out = llava.generate(seen(picture(), "<image> what"), GREEDY, use_tqdm=False)[0]
    num = out.num_item_tokens["image"]
    expanded = seen(picture(), "<image>" * num + " what")
    again = llava.generate(expanded, GREEDY, use_tqdm=False)[0]
    assert again.prompt_token_ids == out.prompt_token_ids
    assert again.outputs[0].token_ids == out.outputs[0].token_ids
    ids = {"prompt_token_ids": out.prompt_token_ids, "multi_modal_data": {"image": picture()}}
    assert ask(llava, ids) == out.outputs[0].token_ids


@pytest.mark.parametrize("num_images", [1, 2])
def test_embeddings_stand_for_images(
    qwen_parts: Parts, llava_parts: Parts, num_images: int
) -> None:
    """Embeddings computed from the pictures give the same answers as the pictures."""
    images = [picture(seed) for seed in range(num_images)]
    for parts, placeholder in ((qwen_parts, VISION), (llava_parts, "<image>")):
        prompt = f"{placeholder} and " * num_images
        prepared = parts.prepare(seen(images, prompt))
        with torch.inference_mode():
            embeds = parts.runner.model.encode([i.features for i in prepared.items])
        data: Any = torch.stack(embeds)
        if parts is qwen_parts:
            grids = torch.tensor([list(i.features.meta["grid"]) for i in prepared.items])
            data = {"image_embeds": torch.cat(embeds), "image_grid_thw": grids}
        assert ask(parts.llm, seen(data, prompt)) == ask(parts.llm, seen(images, prompt))


def test_wrong_embeddings_are_refused(llava: LLM, llava_parts: Parts, llava_folder: Path) -> None:
    hidden = llava_parts.runner.model.shape.hidden_size
    num = llava.generate(seen(picture(), "<image> a"), GREEDY, use_tqdm=False)[0].num_item_tokens
    size = num["image"]
    good = torch.zeros(1, size, hidden)
    bad = {
        "dimensions": good[0, 0],
        "hidden size": torch.zeros(1, size, hidden + 1),
        "count": torch.zeros(1, size + 1, hidden),
        "dtype": good.to(torch.int32),
        "nan": torch.full_like(good, torch.nan),
        "sparse": good.to_sparse(),
    }
    for name, tensor in bad.items():
        with pytest.raises((InvalidEmbeddingsError, InvalidRequestError)) as caught:
            ask(llava, seen([tensor] if name == "dimensions" else tensor, "<image> a"))
        assert caught.value.param is not None, name
    assert ask(llava, "still") == ask(llava, "still")
    with LLM(str(llava_folder), **ROOM) as closed, pytest.raises(SensoriumError) as caught:
        ask(closed, seen([good[0]], "<image> a"))
    assert "enable_mm_embeds" in str(caught.value) or "--enable-mm-embeds" in str(caught.value)


def test_counts_of_placeholders_and_items_must_agree(qwen: LLM) -> None:
    with pytest.raises(PlaceholderMismatchError, match="1"):
        ask(qwen, seen([picture(), picture(1)]))
    with pytest.raises(PlaceholderMismatchError):
        ask(qwen, f"{VISION}{VISION}what")
    with pytest.raises(SensoriumError):
        ask(qwen, {"prompt": "no placeholder", "multi_modal_data": {"image": picture()}})


def test_limits_and_switched_off_modalities(qwen_folder: Path) -> None:
    with LLM(str(qwen_folder), limit_mm_per_prompt={"image": 1}, **ROOM) as llm:
        assert len(ask(llm, seen(picture()))) == 8
        with pytest.raises(TooManyItemsError, match="limit"):
            ask(llm, seen([picture(), picture()], VISION * 2))
    with LLM(str(qwen_folder), limit_mm_per_prompt={"image": 0}, **ROOM) as llm:
        assert len(ask(llm, "text only")) == 8
        with pytest.raises((UnsupportedModalityError, TooManyItemsError)):
            ask(llm, seen(picture()))


def test_modalities_that_the_model_lacks(qwen: LLM, llava: LLM) -> None:
    sound = (np.zeros(100, np.float32), 16000)
    with pytest.raises(UnsupportedModalityError, match="image"):
        ask(llava, {"prompt": "what", "multi_modal_data": {"audio": sound}})


def test_a_bad_prompt_in_a_list_is_named_and_stops_nothing_later(
    qwen: LLM, qwen_parts: Parts
) -> None:
    with pytest.raises(InvalidRequestError, match="Prompt 1"):
        qwen.generate(["good", {"promt": "typo"}], GREEDY, use_tqdm=False)
    with pytest.raises(PromptTooLongError, match="Prompt 2"):
        qwen.generate(["a", "b", "long " * 1000], GREEDY, use_tqdm=False)
    assert not qwen_parts.engine.has_work or qwen.generate("go on", GREEDY, use_tqdm=False)
    assert qwen.stats().num_running == 0
    assert len(ask(qwen, "go on")) == 8


def test_uuids_are_names_of_what_is_cached(qwen: LLM) -> None:
    first = {**seen(picture(3)), "multi_modal_uuids": {"image": "sku-1"}}
    tokens = ask(qwen, first)
    named = {**seen(None), "multi_modal_uuids": {"image": ["sku-1"]}}
    assert ask(qwen, named) == tokens
    with pytest.raises(MediaNotCachedError):
        ask(qwen, {**seen(None), "multi_modal_uuids": {"image": ["sku-2"]}})


def test_the_same_image_again_costs_nothing(qwen: LLM) -> None:
    image = picture(77, (200, 150))
    first = qwen.generate(seen(image), GREEDY, use_tqdm=False)[0]
    before = qwen.stats()
    second = qwen.generate(seen(image, f"{VISION}else"), GREEDY, use_tqdm=False)[0]
    after = qwen.stats()
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 32
    for name in ("decode_count", "preprocess_count"):
        assert after.media[name] == before.media[name]
    assert after.encoder_items == before.encoder_items


def test_salts_separate(qwen: LLM) -> None:
    prompt = {"prompt": "salted " * 30}
    qwen.generate({**prompt, "cache_salt": "a"}, GREEDY, use_tqdm=False)
    for salt, cached in (("b", False), ("a", True)):
        out = qwen.generate({**prompt, "cache_salt": salt}, GREEDY, use_tqdm=False)[0]
        assert bool(out.num_cached_tokens) is cached


def test_a_seed_gives_the_same_tokens_in_any_batch(qwen: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=12, ignore_eos=True, n=2)
    other = SamplingParams(temperature=1.3, max_tokens=12, ignore_eos=True)
    alone = qwen.generate("a word", params, use_tqdm=False)[0]
    crowd = qwen.generate(["x y", "a word", "z"], [other, params, other], use_tqdm=False)[1]
    assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in crowd.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids


def test_stop_strings_end_a_sample(qwen: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    text = qwen.generate("tell", params, use_tqdm=False)[0].outputs[0].text
    stop = text[3:6]
    out = qwen.generate("tell", params.replace(stop=[stop]), use_tqdm=False)[0].outputs[0]
    assert out.finish_reason == "stop"
    assert out.stop_reason == stop
    assert out.text == text[: text.index(stop)]
    assert qwen.stats().num_running == 0


def test_prompt_logprobs_equal_those_of_the_reference(qwen: LLM, qwen_folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2, logprobs=1)
    prompt = "how many red squares are there in the picture"
    out = qwen.generate(prompt, params, use_tqdm=False)[0]
    model = AutoModelForImageTextToText.from_pretrained(qwen_folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([out.prompt_token_ids])).logits[0]
    expected = torch.log_softmax(logits, -1)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(out.prompt_token_ids)
    for position, entry in enumerate(out.prompt_logprobs[1:], 1):
        assert entry is not None
        token = out.prompt_token_ids[position]
        assert entry[token].logprob == pytest.approx(expected[position - 1, token].item(), abs=1e-3)
        assert len(entry) in (2, 3)
    first = out.outputs[0].logprobs
    assert first is not None
    assert max(v.logprob for v in first[0].values()) == pytest.approx(
        expected[-1].max().item(), abs=1e-3
    )


def test_structured_outputs(qwen: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=40)
    for kind, matches in (
        ({"choice": ["red", "green"]}, lambda t: t in ("red", "green")),
        ({"regex": "[0-9]{3}-[a-f]{2}"}, lambda t: len(t) == 6 and t[3] == "-"),
    ):
        out = qwen.generate("x", params.replace(structured_outputs=kind), use_tqdm=False)[0]
        assert matches(out.outputs[0].text), out.outputs[0].text


def test_chat_renders_and_answers(qwen: LLM) -> None:
    message = {
        "role": "user",
        "content": [
            {"type": "text", "text": "look"},
            {"type": "image_pil", "image_pil": picture()},
            {"type": "text", "text": "<|im_end|> is only text"},
        ],
    }
    out = qwen.chat([message], GREEDY, use_tqdm=False)[0]
    assert out.prompt is not None
    assert VISION in out.prompt
    end = qwen.get_tokenizer().token_id("<|im_end|>")
    # The system prompt's end and the user's: what was typed is not one.
    assert out.prompt_token_ids.count(end or -1) == 2
    several = qwen.chat([[message], [{"role": "user", "content": "hi"}]], GREEDY, use_tqdm=False)
    assert several[0].outputs[0].token_ids == out.outputs[0].token_ids
    streamed = [len(o.outputs[0].token_ids) for o in qwen.chat_stream([message], GREEDY)]
    assert streamed == list(range(1, 9))


def test_leaving_a_stream_frees_its_work(qwen: LLM) -> None:
    stream = qwen.chat_stream([{"role": "user", "content": "hi"}], GREEDY.replace(max_tokens=200))
    next(stream)
    stream.close()
    ask(qwen, "next")
    stats = qwen.stats()
    assert (stats.num_running, stats.kv_blocks_used, stats.held_features) == (0, 0, 0)


def test_transparency_is_composed_over_the_background(qwen_folder: Path) -> None:
    transparent = Image.new("RGBA", (60, 60), (255, 0, 0, 0))
    prompts = [seen(transparent), seen(Image.new("RGB", (60, 60), (0, 0, 255)))]
    options = {"image": {"rgba_background_color": [0, 0, 255]}}
    with LLM(str(qwen_folder), media_io_kwargs=options, **ROOM) as llm:
        blue, plain = (ask(llm, prompt) for prompt in prompts)
    assert blue == plain
    with pytest.raises(ConfigError):
        LLM(str(qwen_folder), media_io_kwargs={"image": {"rgba_background_color": [0, 0, 300]}})


def test_mm_processor_kwargs_change_the_size(qwen: LLM) -> None:
    small = {**seen(picture(5, (200, 200))), "mm_processor_kwargs": {"max_pixels": 56 * 56}}
    out = qwen.generate(small, GREEDY, use_tqdm=False)[0]
    assert out.num_item_tokens == {"image": 4}
    with pytest.raises(InvalidRequestError, match="max_pixels"):
        ask(qwen, {**seen(picture()), "mm_processor_kwargs": {"max_pixel": 3}})


def test_paths_are_refused_unless_allowed(qwen: LLM, qwen_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    part = {"type": "image_url", "image_url": {"url": f"file://{path}"}}
    message = [{"role": "user", "content": [part]}]
    with pytest.raises(MediaRefusedError) as caught:
        qwen.chat(message, GREEDY, use_tqdm=False)
    assert caught.value.param == "messages[0].content[0].image_url"
    with LLM(str(qwen_folder), allowed_local_media_path=str(tmp_path), **ROOM) as llm:
        assert llm.chat(message, GREEDY, use_tqdm=False)[0].num_item_tokens == {"image": 4}


def test_unknown_keywords_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM("demo", max_modl_len=3)


def test_impossible_settings_are_refused(qwen_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="KV cache holds"):
        LLM(str(qwen_folder), max_model_len=512, num_kv_blocks=2, block_size=16)
    with pytest.raises(ConfigError):
        LLM(str(tmp_path / "missing"))
    with pytest.raises(ConfigError):
        LLM(str(qwen_folder), device="quantum")
    with (
        pytest.raises(InvalidRequestError, match="2 prompts"),
        LLM(str(qwen_folder), **ROOM) as llm,
    ):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)


def test_an_endless_text_is_refused_by_its_beginning(
    qwen: LLM, qwen_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all of it is tokenized; and a long text of few tokens is not refused for its characters."""
    tokenizer, seen_chars = qwen.get_tokenizer(), []
    encode = tokenizer.encode

    def noted(text: str, **options: bool) -> list[int]:
        seen_chars.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", noted)
    most = qwen_parts.engine.facts.max_model_len
    with pytest.raises(PromptTooLongError, match="of which the first"):
        ask(qwen, "long " * (40 * most))
    assert seen_chars == [16 * most]
    few = "<|endoftext|>" * (most // 2)
    monkeypatch.setattr("sensorium.engine.prompts.lengths.PROBED_CHARS", 1)
    assert len(few) > 4 * most
    assert qwen_parts.processor.render(RawPrompt(text=few)).token_ids
