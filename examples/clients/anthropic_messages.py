"""Anthropic's client: a picture, streamed, and a tool.

python examples/clients/anthropic_messages.py IMAGE [BASE_URL]
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

from anthropic import Anthropic

WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a place.",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 20}},
        "required": ["place"],
    },
}


def main(path: str, base_url: str = "http://127.0.0.1:8000") -> None:
    """Print the answers."""
    client = Anthropic(base_url=base_url, api_key="none")
    picture = base64.b64encode(Path(path).read_bytes()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": picture}
    content: Any = [
        {"type": "image", "source": source},
        {"type": "text", "text": "What is in the picture?"},
    ]
    messages: Any = [{"role": "user", "content": content}]
    print("tokens:", client.messages.count_tokens(model="demo", messages=messages).input_tokens)
    with client.messages.stream(model="demo", max_tokens=64, messages=messages) as stream:
        for text in stream.text_stream:
            print(text, end="", flush=True)
    print()

    messages = [{"role": "user", "content": "Weather?"}]
    choice: Any = {"type": "tool", "name": "weather"}
    asked = client.messages.create(
        model="demo", max_tokens=64, messages=messages, tools=[WEATHER], tool_choice=choice
    )
    [use] = asked.content
    print("call:", use.name, use.input)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
    messages += [
        {"role": "assistant", "content": asked.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(model="demo", max_tokens=32, messages=messages, tools=[WEATHER])
    print("then:", answer.stop_reason)


if __name__ == "__main__":
    main(*sys.argv[1:])
