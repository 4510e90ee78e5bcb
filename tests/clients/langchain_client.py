"""LangChain: structured output by both methods, and any of several tools."""

from __future__ import annotations

from typing import Any

from cases import KEY, MODEL, QUESTION, URL, Person, Scene, count
from langchain_openai import ChatOpenAI


def model(seed: int) -> Any:
    """A model whose requests have a seed."""
    return ChatOpenAI(
        model=MODEL, base_url=URL, api_key=KEY, seed=seed, temperature=1, max_retries=0
    )


def structured(method: str, schema: type, seed: int) -> bool:
    """An answer of the type that was asked for."""
    answer = model(seed).with_structured_output(schema, method=method).invoke(QUESTION)
    return isinstance(answer, schema)


def any_tool(seed: int) -> bool:
    """Calls whose arguments are those of their tools."""
    answer = model(seed).bind_tools([Person, Scene], tool_choice="any").invoke(QUESTION)
    tools: dict[str, Any] = {"Person": Person, "Scene": Scene}
    for call in answer.tool_calls:
        tools[call["name"]].model_validate(call["args"])
    return bool(answer.tool_calls) and not answer.invalid_tool_calls


for how in ("function_calling", "json_schema"):
    for kind in (Person, Scene):
        count(
            f"with_structured_output, {how}, {kind.__name__}",
            lambda seed, how=how, kind=kind: structured(how, kind, seed),
        )
count('bind_tools(tool_choice="any")', any_tool)
