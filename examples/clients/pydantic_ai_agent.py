"""pydantic-ai over Responses: a picture, and a form.

python examples/clients/pydantic_ai_agent.py IMAGE [BASE_URL]
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Shape(BaseModel):
    """The form of a structured answer."""

    kind: str
    sides: int


def main(path: str, base_url: str = "http://127.0.0.1:8000") -> None:
    """Print the answers."""
    provider = OpenAIProvider(base_url=f"{base_url}/v1", api_key="none")
    model = OpenAIResponsesModel("demo", provider=provider)
    picture = BinaryContent(Path(path).read_bytes(), media_type="image/png")
    answer = Agent(model).run_sync([picture, "What is in the picture?"])
    print(answer.output)

    for form in (NativeOutput(Shape), Shape):  # by a schema, by a call
        agent = Agent(model, output_type=form)
        shape = agent.run_sync("A square.", model_settings={"temperature": 0}).output
        print("form:", shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
