"""LiteLLM, over chat completions and over Responses: a picture.

python examples/clients/litellm_chat.py IMAGE [BASE_URL]
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import litellm

QUESTION = "What is in the picture?"


def main(path: str, base_url: str = "http://127.0.0.1:8000") -> None:
    """Print the answers."""
    picture = f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
    server = {"model": "openai/demo", "api_base": f"{base_url}/v1", "api_key": "none"}
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": QUESTION},
    ]
    chunks = litellm.completion(
        messages=[{"role": "user", "content": content}], stream=True, **server
    )
    print("".join(chunk.choices[0].delta.content or "" for chunk in chunks))

    parts = [
        {"type": "input_image", "image_url": picture},
        {"type": "input_text", "text": QUESTION},
    ]
    response = litellm.responses(input=[{"role": "user", "content": parts}], **server)
    print(response.output[0].content[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
