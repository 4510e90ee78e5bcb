"""LiteLLM: tools that must be called, and formats."""

from __future__ import annotations

from typing import Any

import litellm
from cases import KEY, MESSAGES, MODEL, URL, Person, Scene, count

KINDS: dict[str, Any] = {"Person": Person, "Scene": Scene}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": kind.model_json_schema()}}
    for name, kind in KINDS.items()
]


def ask(seed: int, **fields: Any) -> Any:
    """The message of an answer."""
    answer = litellm.completion(
        model=f"openai/{MODEL}",
        api_base=URL,
        api_key=KEY,
        messages=MESSAGES,
        seed=seed,
        temperature=1,
        num_retries=0,
        **fields,
    )
    return answer.choices[0].message


def tools(seed: int, **fields: Any) -> bool:
    """Calls whose arguments are those of their tools."""
    calls = ask(seed, tools=TOOLS, tool_choice="required", **fields).tool_calls or []
    for call in calls:
        KINDS[call.function.name].model_validate_json(call.function.arguments)
    return bool(calls)


def formatted(seed: int) -> bool:
    """An answer in the form of a model."""
    Scene.model_validate_json(ask(seed, response_format=Scene).content)
    return True


count("tools, required", tools)
count("tools, required, one", lambda seed: tools(seed, parallel_tool_calls=False))
count("response_format", formatted)
