"""OpenAI's Agents SDK: an agent that looks at a picture, and one that calls a function.

python examples/clients/agents_sdk.py IMAGE [BASE_URL]
"""

from __future__ import annotations

import asyncio
import base64
import sys
from pathlib import Path
from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

CALLED: list[str] = []


@function_tool
def weather(place: str) -> str:
    """Return the weather of a place."""
    CALLED.append(place)
    return "rain"


async def main(path: str, base_url: str = "http://127.0.0.1:8000") -> None:
    """Print the answers."""
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none")
    model = OpenAIResponsesModel(model="demo", openai_client=client)
    picture = base64.b64encode(Path(path).read_bytes()).decode()
    question: Any = [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": f"data:image/png;base64,{picture}"},
                {"type": "input_text", "text": "What is in the picture?"},
            ],
        }
    ]
    watcher = Agent(name="Watcher", model=model)
    streamed = Runner.run_streamed(watcher, question)
    async for event in streamed.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            print(event.data.delta, end="", flush=True)
    print()

    forecaster = Agent(
        name="Forecaster",
        model=model,
        tools=[weather],
        model_settings=ModelSettings(
            tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=256
        ),
    )
    result = await Runner.run(forecaster, "What is the weather?", max_turns=3)
    print("called:", len(CALLED), "answered:", isinstance(result.final_output, str))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
