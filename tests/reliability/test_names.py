"""Names that scripts for vLLM and Aphrodite import or call, and embeddings for a model whose
tower is not loaded.
"""

from __future__ import annotations

import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium import LLM, SamplingParams
from sensorium.errors import InvalidRequestError, UnsupportedModalityError
from sensorium.text.tokenizer import Tokenizer
from tests import checkpoints
from tests.parts import build_llm
from tests.reliability.media import picture

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ROOM = {"num_kv_blocks": 200, "max_model_len": 1024}
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


def test_types_for_annotations() -> None:
    from sensorium.inputs import PromptInputs, PromptStrictInputs, PromptType, TextPrompt
    from sensorium.multimodal import MultiModalDataDict
    from sensorium.multimodal.inputs import MultiModalDataDict as Same

    assert MultiModalDataDict is Same

    def ask(prompt: PromptType, data: MultiModalDataDict) -> PromptStrictInputs | PromptInputs:
        return TextPrompt(prompt=str(prompt), multi_modal_data=data)

    assert ask("a", {"image": 1}) == {"prompt": "a", "multi_modal_data": {"image": 1}}
    assert typing.get_args(PromptType)


def test_they_are_light() -> None:
    code = "import sys, sensorium.inputs; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("make", [checkpoints.make_minicpmv, checkpoints.make_qwen2_vl])
def test_the_tokenizer_applies_the_chat_template(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    """As the guide's examples use it: the text that ``chat`` would make, for ``generate``."""
    make(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    shown = {"type": "image_pil", "image_pil": picture()}
    with LLM(str(tmp_path), **ROOM) as llm:
        tokenizer = llm.get_tokenizer()
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        asked = {"prompt": prompt, "multi_modal_data": {"image": picture()}}
        (own,) = llm.generate([asked], GREEDY, use_tqdm=False)
        messages = [{"role": "user", "content": [shown, content[1]]}]
        (chatted,) = llm.chat(messages, GREEDY, use_tqdm=False)
        assert own.prompt_token_ids == chatted.prompt_token_ids
        assert own.outputs[0].token_ids == chatted.outputs[0].token_ids
        plain = [{"role": "user", "content": "Hello"}]
        ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        assert tokenizer.encode(str(text), add_special_tokens=False) == ids
        vocabulary = tokenizer.get_vocab()
        assert all(tokenizer.token_id(t) == i for t, i in list(vocabulary.items())[:300])
        assert vocabulary["<|im_end|>"] == tokenizer.token_id("<|im_end|>")


def test_a_tokenizer_alone_has_no_template(tmp_path: Path) -> None:
    checkpoints.make_text("llama", tmp_path)
    with pytest.raises(InvalidRequestError, match="chat template"):
        Tokenizer.from_folder(tmp_path).apply_chat_template([{"role": "user", "content": "a"}])


def test_embeddings_alone_need_no_tower(tmp_path: Path) -> None:
    """A limit of 0 switches the encoder off.

    Embeddings pass, several of them, in ``generate`` and in ``chat``.
    """
    checkpoints.make_llava(tmp_path)
    off = {"limit_mm_per_prompt": {"image": 0}, "enable_mm_embeds": True, **ROOM}
    raw = {"prompt": "<image>", "multi_modal_data": {"image": picture()}}
    with build_llm(tmp_path, enable_mm_embeds=True, **ROOM) as whole:
        (seen,) = whole.llm.generate([raw], GREEDY, use_tqdm=False)
        size = seen.num_item_tokens["image"], whole.runner.model.shape.hidden_size
        embeds = torch.randn(2, *size)
        prompt = {"prompt": "<image> and <image>", "multi_modal_data": {"image": embeds}}
        (expected,) = whole.llm.generate([prompt], GREEDY, use_tqdm=False)
    with build_llm(tmp_path, **off) as parts:
        llm = parts.llm
        assert not parts.runner.model.has_encoder
        (found,) = llm.generate([prompt], GREEDY, use_tqdm=False)
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        part = {"type": "image_embeds", "image_embeds": embeds[0]}
        assert llm.chat([{"role": "user", "content": [part]}], GREEDY, use_tqdm=False)
        with pytest.raises(UnsupportedModalityError, match="switched off here by limit_mm"):
            llm.generate([raw], GREEDY)
    with (
        LLM(str(tmp_path), limit_mm_per_prompt={"image": 0}, **ROOM) as closed,
        pytest.raises(UnsupportedModalityError, match="switched off"),
    ):
        closed.generate([prompt], GREEDY)
