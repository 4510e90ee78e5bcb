"""Ask the demo model about images, offline, several at once.

python examples/offline.py image.png another.png
"""

from __future__ import annotations

import sys

from PIL import Image

from sensorium import LLM, SamplingParams


def main(paths: list[str]) -> None:
    """Print a description of each image."""
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": Image.open(path)},
                    {"type": "text", "text": "What is in the picture?"},
                ],
            }
        ]
        for path in paths
    ]
    with LLM(model="demo") as llm:
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=48))
    for path, output in zip(paths, outputs, strict=True):
        print(f"{path}: {output.outputs[0].text}")


if __name__ == "__main__":
    main(sys.argv[1:])
