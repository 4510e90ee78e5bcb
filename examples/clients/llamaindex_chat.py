"""LlamaIndex: a picture, and a form.

python examples/clients/llamaindex_chat.py IMAGE [BASE_URL]
"""

from __future__ import annotations

import sys
from pathlib import Path

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Shape(BaseModel):
    """The form of a structured answer."""

    kind: str
    sides: int


def main(path: str, base_url: str = "http://127.0.0.1:8000") -> None:
    """Print the answers."""
    llm = OpenAILike(
        model="demo",
        api_base=f"{base_url}/v1",
        api_key="none",
        is_chat_model=True,
        should_use_structured_outputs=True,
        temperature=0.0,
    )
    blocks = [
        ImageBlock(path=Path(path), image_mimetype="image/png"),
        TextBlock(text="What is in the picture?"),
    ]
    answer = llm.stream_chat([ChatMessage(role="user", blocks=blocks)])
    print("".join(piece.delta or "" for piece in answer))

    form = llm.as_structured_llm(Shape).chat([ChatMessage(role="user", content="A square.")])
    print("form:", form.raw)


if __name__ == "__main__":
    main(*sys.argv[1:])
