"""Process that reports when it reached its first token; ``startup`` runs it.

    python -m sensorium.bench.first_token '{"model": "demo"}'

The last line on stdout is JSON: seconds of ``time.monotonic()``, a clock that all processes of a
machine share.
"""

from __future__ import annotations

import json
import sys
import time

PROMPT = "The first word of an answer is often"


def main() -> None:
    """Import, load, generate one token and print the times."""
    started = time.monotonic()
    keywords = json.loads(sys.argv[1])
    from sensorium import LLM, SamplingParams

    imported = time.monotonic()
    llm = LLM(**keywords)
    loaded = time.monotonic()
    llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    first_token = time.monotonic()
    llm.close()
    marks = {
        "started": started,
        "imported": imported,
        "loaded": loaded,
        "first_token": first_token,
    }
    print(json.dumps(marks), flush=True)


if __name__ == "__main__":
    main()
