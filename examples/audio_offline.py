"""Audio offline: samples with their rate, two audio items in one prompt, and chat.

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


def one_audio(model: str = ULTRAVOX) -> list[RequestOutput]:
    """Pass samples and their rate; they are resampled to the model's rate."""
    prompt = PROMPT.format(question="<|audio|>\nWhat is recited here?")
    audio = AudioAsset("mary_had_lamb").audio_and_sample_rate
    return LLM(model=model).generate(
        {"prompt": prompt, "multi_modal_data": {"audio": audio}}, SHORT
    )


def two_audios(model: str = ULTRAVOX) -> list[RequestOutput]:
    """Pass two audio items in one prompt."""
    prompt = PROMPT.format(question="<|audio|><|audio|>\nWhat do these have in common?")
    names = ("winning_call", "mary_had_lamb")
    audios = [AudioAsset(name).audio_and_sample_rate for name in names]
    llm = LLM(model=model, limit_mm_per_prompt={"audio": 2})
    return llm.generate({"prompt": prompt, "multi_modal_data": {"audio": audios}}, SHORT)


def chat(model: str = ULTRAVOX) -> list[RequestOutput]:
    """Pass a file by its URL in a chat message."""
    content = [
        {"type": "audio_url", "audio_url": {"url": AudioAsset("winning_call").url}},
        {"type": "text", "text": "What happens in this game?"},
    ]
    return LLM(model=model).chat([{"role": "user", "content": content}], SHORT)


EXAMPLES: dict[str, Callable[..., list[RequestOutput]]] = {
    function.__name__: function for function in (one_audio, two_audios, chat)
}

if __name__ == "__main__":
    for output in EXAMPLES[sys.argv[1]](*sys.argv[2:3]):
        print(output.outputs[0].text)
