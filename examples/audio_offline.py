"""Sounds offline: samples with their rate, two in one prompt, and in chat.

python examples/audio_offline.py EXAMPLE [MODEL]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from sensorium import LLM, RequestOutput, SamplingParams
from sensorium.assets.audio import AudioAsset

ULTRAVOX = "fixie-ai/ultravox-v0_5-llama-3_2-1b"
SHORT = SamplingParams(temperature=0, max_tokens=64)
PROMPT = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def one_sound(model: str = ULTRAVOX) -> list[RequestOutput]:
    """Samples and their rate; the model's own rate is made of it."""
    prompt = PROMPT.format(question="<|audio|>\nWhat is recited here?")
    sound = AudioAsset("mary_had_lamb").audio_and_sample_rate
    return LLM(model=model).generate(
        {"prompt": prompt, "multi_modal_data": {"audio": sound}}, SHORT
    )


def two_sounds(model: str = ULTRAVOX) -> list[RequestOutput]:
    """Two sounds in one prompt."""
    prompt = PROMPT.format(question="<|audio|><|audio|>\nWhat do these have in common?")
    names = ("winning_call", "mary_had_lamb")
    sounds = [AudioAsset(name).audio_and_sample_rate for name in names]
    llm = LLM(model=model, limit_mm_per_prompt={"audio": 2})
    return llm.generate({"prompt": prompt, "multi_modal_data": {"audio": sounds}}, SHORT)


def chat(model: str = ULTRAVOX) -> list[RequestOutput]:
    """A file by its URL."""
    content = [
        {"type": "audio_url", "audio_url": {"url": AudioAsset("winning_call").url}},
        {"type": "text", "text": "What happens in this game?"},
    ]
    return LLM(model=model).chat([{"role": "user", "content": content}], SHORT)


EXAMPLES: dict[str, Callable[..., list[RequestOutput]]] = {
    function.__name__: function for function in (one_sound, two_sounds, chat)
}

if __name__ == "__main__":
    for output in EXAMPLES[sys.argv[1]](*sys.argv[2:3]):
        print(output.outputs[0].text)
