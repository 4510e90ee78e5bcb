"""Ask a server (`sensorium serve demo`) about an image with OpenAI's client, streamed.

python examples/openai_client.py image.png "What is in the picture?" [BASE_URL]
"""

from __future__ import annotations

import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI


def main(path: str, question: str, base_url: str = "http://127.0.0.1:8000/v1") -> None:
    """Print the answer as it arrives, then the number of tokens."""
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    client = OpenAI(base_url=base_url, api_key="none")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n{chunk.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
