"""OpenAI's client, Responses: a picture, a stream, a form, a function, a conversation that goes on.

python examples/clients/responses.py IMAGE [BASE_URL]
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI
from pydantic import BaseModel

QUESTION = "What is in the picture?"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 20}},
        "required": ["place"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Shape(BaseModel):
    """The form of a structured answer."""

    kind: str
    sides: int


def main(path: str, base_url: str = "http://127.0.0.1:8000") -> None:
    """Print the answers."""
    client = OpenAI(base_url=f"{base_url}/v1", api_key="none")
    picture = base64.b64encode(Path(path).read_bytes()).decode()
    content: Any = [
        {"type": "input_image", "image_url": f"data:image/png;base64,{picture}", "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    with client.responses.stream(
        model="demo", input=[{"role": "user", "content": content}]
    ) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                print(event.delta, end="", flush=True)
        first = stream.get_final_response()
    print()

    again = client.responses.create(
        model="demo", input="What colour is it?", previous_response_id=first.id
    )
    print(again.output_text)

    parsed = client.responses.parse(
        model="demo", input="A square.", text_format=Shape, temperature=0
    )
    print("form:", parsed.output_parsed)

    asked = client.responses.create(
        model="demo", input="Weather?", tools=[WEATHER], tool_choice="required",
        parallel_tool_calls=False, temperature=0,
    )  # fmt: skip
    [call] = [item for item in asked.output if item.type == "function_call"]
    print("call:", call.name, json.loads(call.arguments))
    told: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    answer = client.responses.create(
        model="demo",
        input=[told],
        previous_response_id=asked.id,
        tools=[WEATHER],
        max_output_tokens=32,
    )
    print("then:", answer.status)


if __name__ == "__main__":
    main(*sys.argv[1:])
