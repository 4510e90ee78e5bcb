"""LlamaIndex: a structured LLM over function calling, and over JSON schemas."""

from __future__ import annotations

from cases import KEY, MODEL, QUESTION, URL, Person, Scene, count
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def structured(schema: type, is_function_calling: bool, seed: int) -> bool:
    """An answer of the type that was asked for."""
    llm = OpenAILike(
        model=MODEL,
        api_base=URL,
        api_key=KEY,
        is_chat_model=True,
        is_function_calling_model=is_function_calling,
        should_use_structured_outputs=not is_function_calling,
        max_retries=0,
        max_tokens=1500,
        temperature=1.0,
        additional_kwargs={"seed": seed},
    )
    answer = llm.as_structured_llm(schema).chat([ChatMessage(role="user", content=QUESTION)])
    return isinstance(answer.raw, schema)


for kind in (Person, Scene):
    for calls in (True, False):
        way = "function calling" if calls else "response_format"
        count(
            f"as_structured_llm, {way}, {kind.__name__}",
            lambda seed, kind=kind, calls=calls: structured(kind, calls, seed),
        )
