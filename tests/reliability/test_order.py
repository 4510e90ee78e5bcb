"""The order of text and media in a message is kept wherever the model's template can say it,
without any flag.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensorium import LLM, SamplingParams
from tests import checkpoints
from tests.reliability.media import picture

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
ROOM = {"num_kv_blocks": 200, "max_model_len": 1024}
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "phi3_v": (checkpoints.make_phi3_v, "one\n<|image_1|>\ntwo\n<|image_2|>\nthree"),
    "minicpmv": (
        checkpoints.make_minicpmv,
        "one\n(<image>./</image>)\ntwo\n(<image>./</image>)\nthree",
    ),
    "qwen2_vl": (checkpoints.make_qwen2_vl, f"one{QWEN}two{QWEN}three"),
}


def pil() -> dict[str, Any]:
    return {"type": "image_pil", "image_pil": picture(40, 40)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_images_stand_where_their_parts_stand(family: str, tmp_path: Path) -> None:
    make, expected = FAMILIES[family]
    make(tmp_path)
    content = [text("one"), pil(), text("two"), pil(), text("three")]
    with LLM(str(tmp_path), **ROOM) as llm:
        (out,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        assert expected in str(out.prompt)
        last = [text("one"), text("two"), pil()]
        (out,) = llm.chat([{"role": "user", "content": last}], GREEDY, use_tqdm=False)
        first_text, placeholder = str(out.prompt).index("two"), str(out.prompt).index("image")
        assert first_text < placeholder


def test_audio_likewise(tmp_path: Path) -> None:
    checkpoints.make_ultravox(tmp_path)
    sound = {"type": "input_audio", "input_audio": {"data": _wav(), "format": "wav"}}
    with LLM(str(tmp_path), **ROOM) as llm:
        content = [text("Listen:"), sound, text("What was it?")]
        (out,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        assert "Listen:<|audio|>What was it?" in str(out.prompt)


def test_in_front_where_that_is_asked_for(tmp_path: Path) -> None:
    checkpoints.make_phi3_v(tmp_path)
    with LLM(str(tmp_path), interleave_mm_strings=False, **ROOM) as llm:
        content = [text("one"), pil(), text("two")]
        (out,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        assert "<|image_1|>\none\ntwo" in str(out.prompt)


def _wav() -> str:
    import base64
    import io

    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros(1600, np.float32), 16000, format="WAV")
    return base64.b64encode(file.getvalue()).decode()
