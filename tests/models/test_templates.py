"""The fallback chat templates give what the published ones do."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sensorium.models.registry import FAMILIES

TEMPLATES = {family.name: family.chat_template() for family in FAMILIES}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


PICTURE = {"type": "image"}
QUESTION = user(text("a"), PICTURE, text("b"), PICTURE)
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    (
        "LLaVA-1.5",
        [{"role": "system", "content": [text("Be kind.")]}, user(text("What?"), PICTURE)],
        {"add_generation_prompt": True},
        "Be kind. USER: <image>\nWhat? ASSISTANT:",
    ),
    (
        "LLaVA-1.5",
        [QUESTION],
        {"add_generation_prompt": True},
        "USER: <image>\n<image>\na b ASSISTANT:",
    ),
    (
        "LLaVA-1.5",
        CHAT,
        {"add_generation_prompt": True},
        "USER: one ASSISTANT: two USER: three ASSISTANT:",
    ),
    ("LLaVA-1.5", CHAT[:1], {"add_generation_prompt": False}, "USER: one "),
    (
        "LLaVA-OneVision",
        [
            {"role": "system", "content": "Be kind."},
            user(text("a"), {"type": "video"}, *QUESTION["content"][1:]),
        ],
        {"add_generation_prompt": True},
        (
            "<|im_start|>system \nBe kind.<|im_end|>"
            "<|im_start|>user <image><image><video>\na\nb<|im_end|><|im_start|>assistant\n"
        ),
    ),
    (
        "LLaVA-OneVision",
        [*CHAT[:2], user(text("x"), text("y"))],
        {},
        (
            "<|im_start|>user \none<|im_end|><|im_start|>assistant \ntwo<|im_end|>"
            "<|im_start|>user \nx\ny<|im_end|>"
        ),
    ),
    (
        "MiniCPM-V 2.6",
        [user(text("a"), PICTURE, text("b"), {"type": "video"}), CHAT[1]],
        {"add_generation_prompt": True},
        (
            f"{SYSTEM}<|im_start|>user\na\n(<image>./</image>)\nb\n(<video>./</video>)<|im_end|>\n"
            "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    (
        "MiniCPM-V 2.6",
        [{"role": "system", "content": "Be kind."}, CHAT[2]],
        {},
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n",
    ),
    (
        "Qwen2-VL",
        [QUESTION],
        {"add_generation_prompt": True},
        f"{SYSTEM}<|im_start|>user\na{IMAGE}b{IMAGE}<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "Qwen2-VL",
        [{"role": "system", "content": "Be kind."}, user({"type": "video"}, text("x"))],
        {},
        f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{VIDEO}x<|im_end|>\n",
    ),
    (
        "Qwen2-VL",
        [QUESTION, user(PICTURE, {"type": "video"})],
        {"add_vision_id": True},
        (
            f"{SYSTEM}<|im_start|>user\naPicture 1: {IMAGE}bPicture 2: {IMAGE}<|im_end|>\n"
            f"<|im_start|>user\nPicture 3: {IMAGE}Video 1: {VIDEO}<|im_end|>\n"
        ),
    ),
    (
        "Ultravox",
        [{"role": "system", "content": " Be kind. "}, user({"type": "audio"}, text("What?"))],
        {"add_generation_prompt": True, "bos_token": "<|begin_of_text|>"},
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<|audio|>What?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_rendered(case: int, trim: bool) -> None:
    family, messages, options, expected = CASES[case]
    environment = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    template = environment.from_string(TEMPLATES[family] or "")
    assert template.render(messages=messages, **options) == expected


def test_text_families_publish_their_own() -> None:
    with_media = {family.name for family in FAMILIES if family.modalities}
    assert {name for name, template in TEMPLATES.items() if template} == with_media
