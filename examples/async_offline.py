"""Ask the demo model from an event loop: concurrent answers, streamed, one aborted.

python examples/async_offline.py
"""

from __future__ import annotations

import asyncio
from typing import Any

from PIL import Image, ImageDraw

from sensorium import AsyncLLM, SamplingParams

DELTAS = SamplingParams(temperature=0, max_tokens=48, output_kind="delta")
QUESTIONS = ("What is in the picture?", "What color is the circle?")


def image() -> Image.Image:
    """Return an image of a red circle on white."""
    drawn = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(drawn).ellipse((60, 60, 160, 160), fill="red")
    return drawn


def conversation(text: str) -> list[dict[str, Any]]:
    """Return a question about the image."""
    part = {"type": "image_pil", "image_pil": image()}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


async def answer(llm: AsyncLLM, text: str) -> str:
    """Collect an answer from its deltas; a chat program would show each as it arrives."""
    pieces = []
    async for output in llm.chat(conversation(text), DELTAS):
        pieces += [sample.text for sample in output.outputs]
    return "".join(pieces)


async def first_words(llm: AsyncLLM, text: str) -> str:
    """Abort an answer after a few tokens; leaving the loop would do the same."""
    found = ""
    async for output in llm.chat([{"role": "user", "content": text}], request_id="short"):
        found = output.outputs[0].text
        if len(output.outputs[0].token_ids) >= 8 and not output.finished:
            await llm.abort("short")
    return found


async def main(model: str = "demo") -> list[str]:
    """Run all requests concurrently and print the answers."""
    async with AsyncLLM(model=model) as llm:
        asked = [answer(llm, text) for text in QUESTIONS]
        texts = await asyncio.gather(*asked, first_words(llm, "What can you do?"))
    for text in texts:
        print(text)
    return texts


if __name__ == "__main__":
    asyncio.run(main())
