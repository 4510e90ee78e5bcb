"""Models that run through the code of transformers, in the engine.

Cut up, cached, side by side, in chat, refused.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from sensorium import LLM, SamplingParams
from sensorium.errors import (
    InvalidEmbeddingsError,
    InvalidRequestError,
    PlaceholderMismatchError,
    PromptTooLongError,
)
from sensorium.multimodal.items import Audio
from tests.checkpoints.hf import make_hf, make_hf_text
from tests.models.families.test_hf_media import (
    NUM_TOKENS,
    PLACEHOLDERS,
    PROMPTS,
    Reference,
    media_of,
)
from tests.models.harness import Reference as TextReference
from tests.models.harness import Running, picture, text_ids
from tests.parts import patient_llm

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunked": {"max_num_batched_tokens": 8, "max_num_seqs": 2, "block_size": 8},
    "preempted": {"num_kv_blocks": 19, "block_size": 8, "max_num_seqs": 6},
}


@dataclass(frozen=True)
class Case:
    """A checkpoint, its prompts, and what the reference answers."""

    family: str
    folder: Path
    prompts: list[dict[str, Any]]
    tokens: list[list[int]]


@pytest.fixture(scope="module", params=["gemma3", "idefics3", "qwen2_audio"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = request.param
    folder = make_hf(family, tmp_path_factory.mktemp(family))
    reference = Reference(folder)
    prompts, tokens = [], []
    for text in PROMPTS[family]:
        media = media_of(family, text.count(PLACEHOLDERS[family]))
        tokens.append(reference.run(reference.inputs(text, media))[1])
        prompts.append(asked(text, media))
    return Case(family, folder, prompts, tokens)


def asked(text: str, media: list[Any]) -> dict[str, Any]:
    sounds = [(item.samples, item.rate) for item in media if isinstance(item, Audio)]
    images = [item for item in media if not isinstance(item, Audio)]
    data = {"audio": sounds} if sounds else {"image": images}
    return {"prompt": text, "multi_modal_data": data if media else {}}


@pytest.fixture(params=SETTINGS)
def llm(request: pytest.FixtureRequest, case: Case) -> Iterator[LLM]:
    settings = SETTINGS[request.param]
    with patient_llm(str(case.folder), max_model_len=150, **settings) as llm:
        yield llm


def test_equal_to_the_reference_cold_and_warm(
    llm: LLM, case: Case, request: pytest.FixtureRequest
) -> None:
    for _ in range(2):
        found = llm.generate(case.prompts * 2, GREEDY, use_tqdm=False)
        assert [out.outputs[0].token_ids for out in found] == case.tokens * 2
    stats = llm.stats()
    assert stats.kv_blocks_used == 0
    if request.node.callspec.params["llm"] == "preempted":
        assert stats.num_preemptions > 0
    else:
        assert found[2].num_cached_tokens > 0


def test_a_prompt_that_attends_to_itself_shares_its_cache_with_its_like_only(
    tmp_path: Path,
) -> None:
    """PaliGemma: the keys of the image differ with the text behind it, which a plain prefix
    cache would not see.
    """
    folder = make_hf("paligemma", tmp_path)
    reference, image = Reference(folder), picture(30, 50, seed=1)
    texts = ["<image>caption en\n", "<image>caption de\n", "<image>caption en\n"]
    wanted = [reference.run(reference.inputs(text, [image]))[1] for text in texts]
    with LLM(str(folder), max_model_len=100, block_size=8, max_num_seqs=1) as llm:
        found = [llm.generate(asked(t, [image]), GREEDY, use_tqdm=False)[0] for t in texts]
        assert [out.outputs[0].token_ids for out in found] == wanted
        assert [out.num_cached_tokens > 0 for out in found] == [False, False, True]
        with pytest.raises(PlaceholderMismatchError, match="1 image placeholder for 2 image"):
            llm.generate(asked("<image><image>which\n", [image, image]))
    with (
        LLM(str(folder), max_model_len=100, max_num_batched_tokens=16, max_num_seqs=2) as llm,
        pytest.raises(PromptTooLongError, match="attend to one another both ways"),
    ):
        llm.generate(asked(texts[0], [image]))


def test_text_with_windows(tmp_path: Path) -> None:
    folder = make_hf_text("gemma2", tmp_path)
    texts = ["The quick brown fox", "three red squares to the left of a blue circle. " * 4]
    reference = TextReference(folder)
    wanted = []
    for text in texts:
        seq = Running(text_ids(folder, text), [], None, 0, [])
        wanted.append(reference.greedy(seq, NUM_TOKENS))
    with LLM(str(folder), max_model_len=200, block_size=8, max_num_batched_tokens=9) as llm:
        for _ in range(2):
            found = llm.generate(texts, GREEDY, use_tqdm=False)
            assert [out.outputs[0].token_ids for out in found] == wanted
        vocab = {"allowed_token_ids": [5, 6, 7]}
        (other,) = llm.generate(texts[0], SamplingParams(max_tokens=4, **vocab), use_tqdm=False)
        assert set(other.outputs[0].token_ids) <= {5, 6, 7}


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}model\n"
)


def test_chat_embeddings_and_options(tmp_path: Path) -> None:
    folder = make_hf("gemma3", tmp_path)
    image = picture(40, 40, seed=2)
    content = [
        {"type": "image_pil", "image_pil": pil(image)},
        {"type": "text", "text": "Is <start_of_image> text?"},
    ]
    with LLM(str(folder), max_model_len=150, chat_template=TEMPLATE, enable_mm_embeds=True) as llm:
        (out,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        assert sum(token == 382 for token in out.prompt_token_ids) == 4, "one image, four places"
        text = "user\n<start_of_image>What?\nmodel\n"
        given = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        prompt = {"prompt": text, "multi_modal_data": {"image": [given]}}
        (out,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert len(out.outputs[0].token_ids) == NUM_TOKENS
        with pytest.raises(InvalidEmbeddingsError, match="hidden size 64"):
            llm.generate({"prompt": text, "multi_modal_data": {"image": [given[:, :60]]}})
        one = asked(text, [image])
        with pytest.raises(InvalidRequestError, match=r"no option 'tiles'; it has .*do_resize"):
            llm.generate(one | {"mm_processor_kwargs": {"tiles": 2}})
        with pytest.raises(InvalidRequestError, match="processor does not take this image"):
            llm.generate(one | {"mm_processor_kwargs": {"size": {"depth": 3}}})
        (out,) = llm.generate(one, GREEDY, use_tqdm=False)
        assert len(out.outputs[0].token_ids) == NUM_TOKENS, "and it goes on"


SOUNDS = {
    "voxtral": "<s>[INST][BEGIN_AUDIO]{}hi[/INST]",
    "qwen2_audio": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "Audio 1: <|audio_bos|>{}<|audio_eos|>\nhi<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(SOUNDS))
def test_chat_about_sounds_without_a_template_of_the_folder(tmp_path: Path, family: str) -> None:
    folder = make_hf(family, tmp_path)
    (sound,) = media_of(family, 1)
    buffer = io.BytesIO()
    soundfile.write(buffer, sound.samples, sound.rate, format="WAV", subtype="FLOAT")
    data = {"data": base64.b64encode(buffer.getvalue()).decode(), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": data}, {"type": "text", "text": "hi"}]
    with LLM(str(folder), max_model_len=600, num_media_workers=1) as llm:
        (out,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        expected = SOUNDS[family].format(PLACEHOLDERS[family])
        ids = text_ids(folder, expected.removeprefix("<s>"))
        num = {"voxtral": 375, "qwen2_audio": 7}[family]
        place = ids.index(text_ids(folder, PLACEHOLDERS[family])[-1])
        assert out.prompt_token_ids == [*ids[:place], *[ids[place]] * num, *ids[place + 1 :]]


def pil(image: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(image)
