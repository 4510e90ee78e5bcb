"""A model over the rows of a dataset, on engines that Ray runs.

Needs Ray: pip install "sensorium[ray]"
"""

import ray

from sensorium.ray import build_processor

QUESTIONS = ("What is a prime number?", "What is a comet?", "")


def ask(row: dict) -> dict:
    """Make the conversation that the model sees of a row."""
    return {
        "messages": [{"role": "user", "content": row["question"]}],
        "sampling_params": {"max_tokens": 16, "temperature": 0.0},
    }


def main() -> None:
    processor = build_processor(
        "demo", preprocess=ask, concurrency=2, media_concurrency=1, num_threads=1
    )
    dataset = ray.data.from_items([{"question": question} for question in QUESTIONS])
    for row in processor(dataset).iter_rows():
        if row["error"] is not None:
            print(row["question"], "failed:", row["error"]["message"])
        else:
            print(row["question"], "->", row["generated_text"])


if __name__ == "__main__":
    main()
