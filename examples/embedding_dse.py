"""Search images of pages with DSE-Qwen2, which embeds images and questions in one space.

python examples/embedding_dse.py "How many birds are there?" page.png another.png
python examples/embedding_dse.py --model FOLDER --dimensions 512 "..." page.png

The model was trained on questions that follow an image, so a question comes with one of 28 x 28
white pixels, which is one token. The same by HTTP: `sensorium serve MrLight/dse-qwen2-2b-mrl-v1
--runner pooling --chat-template examples/templates/dse_qwen2_vl.jinja`, and `messages` like those
below to /v1/embeddings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sensorium import LLM, PoolingParams

TEMPLATE = Path(__file__).parent / "templates" / "dse_qwen2_vl.jinja"
PIXELS = {"min_pixels": 28 * 28, "max_pixels": 2560 * 28 * 28}
"""As in training; the published preprocessor_config.json has the same values."""
DUMMY = Image.new("RGB", (28, 28), "white")


def message(image: Image.Image, text: str) -> dict[str, Any]:
    """Return a prompt for ``LLM.embed``: a user message with an image and a text."""
    parts = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}]}


def ranking(
    llm: LLM, question: str, pages: Sequence[Image.Image], dimensions: int | None = None
) -> list[tuple[int, float]]:
    """Return (index of the page, similarity to the question), the most similar first."""
    prompts = [message(DUMMY, f"Query: {question}")]
    prompts += [message(page, "What is shown in this image?") for page in pages]
    outputs = llm.embed(prompts, pooling_params=PoolingParams(dimensions=dimensions))
    query, *documents = (np.array(output.outputs.embedding) for output in outputs)
    similarities = [float(query @ document) for document in documents]
    return sorted(enumerate(similarities), key=lambda pair: -pair[1])


def main() -> None:
    """Rank the pages given on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("pages", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", default="MrLight/dse-qwen2-2b-mrl-v1")
    parser.add_argument("--dimensions", type=int, help="length of the embeddings")
    arguments = parser.parse_args()
    with LLM(
        model=arguments.model,
        runner="pooling",
        chat_template=str(TEMPLATE),
        hf_overrides={"is_matryoshka": True},
        mm_processor_kwargs=PIXELS,
    ) as llm:
        pages = [Image.open(path) for path in arguments.pages]
        for index, similarity in ranking(llm, arguments.question, pages, arguments.dimensions):
            print(f"{similarity:7.4f}  {arguments.pages[index]}")


if __name__ == "__main__":
    main()
