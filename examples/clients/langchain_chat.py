"""LangChain, over chat completions and over Responses: a picture, streamed, and a form.

python examples/clients/langchain_chat.py IMAGE [BASE_URL]
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Shape(BaseModel):
    """The form of a structured answer."""

    kind: str
    sides: int


def main(path: str, base_url: str = "http://127.0.0.1:8000") -> None:
    """Print the answers."""
    picture = base64.b64encode(Path(path).read_bytes()).decode()
    question = HumanMessage(
        [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": "What is in the picture?"},
        ]
    )
    for uses_responses in (False, True):
        model = ChatOpenAI(
            model="demo",
            base_url=f"{base_url}/v1",
            api_key="none",
            use_responses_api=uses_responses,
        )
        print("".join(chunk.text for chunk in model.stream([question])))
        form = model.with_structured_output(Shape, method="json_schema")
        print("form:", form.invoke("A square."))


if __name__ == "__main__":
    main(*sys.argv[1:])
