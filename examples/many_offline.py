"""Answer many questions, read from an iterator; answers are written as they finish.

python examples/many_offline.py questions.txt > answers.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sensorium import LLM, SamplingParams


def conversations(path: str) -> Iterator[list[dict[str, Any]]]:
    """Yield one question per line; the file is read only as far as the model needs it."""
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            yield [{"role": "user", "content": line.strip()}]


def main(path: str, model: str = "demo") -> None:
    """Print a JSON object for each line, in the order in which answers finish."""
    params = SamplingParams(temperature=0, max_tokens=48)
    with LLM(model=model) as llm:
        for output in llm.chat(conversations(path), params, use_tqdm=False, stream=True):
            print(json.dumps({"line": output.index, "answer": output.outputs[0].text}))


if __name__ == "__main__":
    main(sys.argv[1])
