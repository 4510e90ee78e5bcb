"""instructor: a picture described in a form.

python examples/clients/instructor_form.py IMAGE [BASE_URL]
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Shape(BaseModel):
    """The form of a structured answer."""

    kind: Literal["circle", "square", "triangle", "star"]


def main(path: str, base_url: str = "http://127.0.0.1:8000") -> None:
    """Print the form."""
    openai = OpenAI(base_url=f"{base_url}/v1", api_key="none")
    client = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA)
    picture = base64.b64encode(Path(path).read_bytes()).decode()
    content: Any = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    shape = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": content}],
        response_model=Shape,
        temperature=0,
    )
    print("form:", shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
