"""Ask the demo model from a program with an event loop: answers side by side, in pieces, and one cut short.

python examples/async_offline.py
"""

from __future__ import annotations

import asyncio
from typing import Any

from PIL import Image, ImageDraw

from sensorium import AsyncLLM, SamplingParams

DELTAS = SamplingParams(temperature=0, max_tokens=48, output_kind="delta")
QUESTIONS = ("What is in the picture?", "What color is the circle?")


def picture() -> Image.Image:
    """A red circle on white."""
    image = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(image).ellipse((60, 60, 160, 160), fill="red")
    return image


def conversation(text: str) -> list[dict[str, Any]]:
    """A question about the picture."""
    image = {"type": "image_pil", "image_pil": picture()}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


async def answer(llm: AsyncLLM, text: str) -> str:
    """Collect an answer from its pieces; a chat program would show each as it comes."""
    pieces = []
    async for output in llm.chat(conversation(text), DELTAS):
        pieces += [sample.text for sample in output.outputs]
    return "".join(pieces)


async def first_words(llm: AsyncLLM, text: str) -> str:
    """End an answer when enough of it is there: by ``abort``, from anywhere, or by leaving the loop."""
    found = ""
    async for output in llm.chat([{"role": "user", "content": text}], request_id="short"):
        found = output.outputs[0].text
        if len(output.outputs[0].token_ids) >= 8 and not output.finished:
            await llm.abort("short")
    return found


async def main(model: str = "demo") -> list[str]:
    """Run all at the same time and print what comes."""
    async with AsyncLLM(model=model) as llm:
        asked = [answer(llm, text) for text in QUESTIONS]
        texts = await asyncio.gather(*asked, first_words(llm, "What can you do?"))
    for text in texts:
        print(text)
    return texts


if __name__ == "__main__":
    asyncio.run(main())
