"""The official client: parsed answers and tools, streamed and not."""

from __future__ import annotations

from typing import Any

import openai
from cases import KEY, MESSAGES, MODEL, URL, Person, Scene, count

client = openai.OpenAI(base_url=URL, api_key=KEY)
TOOLS: Any = [openai.pydantic_function_tool(Person), openai.pydantic_function_tool(Scene)]
NAMED: Any = {"type": "function", "function": {"name": "Scene"}}


def parse(seed: int) -> object:
    """A parsed answer."""
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Scene, seed=seed, temperature=1
    )
    return answer.choices[0].message.parsed


def parse_stream(seed: int) -> object:
    """A parsed answer that was streamed."""
    asked = client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Scene, seed=seed, temperature=1
    )
    with asked as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0].message.parsed


def call(choice: Any, seed: int) -> bool:
    """Calls with parsed arguments."""
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1
    )
    calls = answer.choices[0].message.tool_calls or []
    return bool(calls) and all(c.function.parsed_arguments is not None for c in calls)


def call_stream(choice: Any, seed: int) -> bool:
    """Calls that were streamed."""
    asked = client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1
    )
    with asked as stream:
        for _ in stream:
            pass
        calls = stream.get_final_completion().choices[0].message.tool_calls or []
    return bool(calls) and all(c.function.parsed_arguments is not None for c in calls)


count(".parse()", parse)
count(".parse(), streamed", parse_stream)
count("tools, required", lambda seed: call("required", seed))
count("tools, required, streamed", lambda seed: call_stream("required", seed))
count("tools, named", lambda seed: call(NAMED, seed))
count("tools, named, streamed", lambda seed: call_stream(NAMED, seed))
