"""Service times of an engine: how long a step takes, measured, and as a formula.

    python -m benchmarks.fleet.service [--model FOLDER] [--output FILE]

A step costs ``step + token * prompt tokens + sequence * decoding sequences + context * tokens that
these attend to + item * items encoded + embedding * their embeddings``; the coefficients are the
non-negative least squares of steps that a real engine makes here, for relative errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chart import newest
from benchmarks.harness import Report


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step, by what it computes."""

    step: float
    token: float
    sequence: float
    context: float
    item: float
    embedding: float

    def seconds(
        self,
        tokens: float = 0,
        sequences: float = 0,
        context: float = 0,
        items: float = 0,
        embeddings: float = 0,
    ) -> float:
        """Seconds of a step with so many prompt tokens, decoding sequences, and so on."""
        return (
            self.step
            + self.token * tokens
            + self.sequence * sequences
            + self.context * context
            + self.item * items
            + self.embedding * embeddings
        )


def of_the_demo() -> StepCosts:
    """Costs of the demo model, as this script measured them last."""
    return StepCosts(**newest("fleet-service")["costs"])


def of_a_model(checkpoint: str = "qwen2-0.5b", engine: str = "sensorium-int8") -> StepCosts:
    """Costs of a model that ``benchmarks.peers`` has measured: decode steps and prompts.

    It has no encoder: media cost as many tokens as with the demo model.
    """
    figures = newest("peers-native")["checkpoints"][checkpoint]["figures"]
    median = {name: figure["median"].get(engine) for name, figure in figures.items()}
    steps = [
        {"seconds": rows / median[f"decode_b{rows}"], "sequence": rows, "token": 0}
        for rows in (1, 8, 32)
    ]
    costs = fit(steps)
    demo, token = of_the_demo(), 1 / median["prefill_2048"]
    return dataclasses.replace(
        costs,
        token=token,
        item=demo.item / demo.token * token,
        embedding=demo.embedding / demo.token * token,
    )


def fit(steps: list[dict[str, float]]) -> StepCosts:
    """Coefficients that fit measured steps; a tenth too slow counts like a tenth too fast."""
    names = [field.name for field in dataclasses.fields(StepCosts)]
    seconds = np.array([step["seconds"] for step in steps])
    columns = [[step.get(name, 0.0) for name in names[1:]] for step in steps]
    rows = np.column_stack([np.ones(len(steps)), np.array(columns)]) / seconds[:, None]
    scales = rows.max(axis=0)
    scales[scales == 0] = 1.0
    found = _non_negative(rows / scales, np.ones(len(steps))) / scales
    return StepCosts(**dict(zip(names, found.tolist(), strict=True)))


def _non_negative(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients, by coordinate descent."""
    gram, target = rows.T @ rows, rows.T @ wanted
    found = np.zeros(len(target))
    for _ in range(20_000):
        for i in range(len(found)):
            if gram[i, i] > 0:
                rest = target[i] - gram[i] @ found + gram[i, i] * found[i]
                found[i] = max(0.0, rest / gram[i, i])
    return found


class _Recorder:
    """Steps of the runner of this process: what they compute, and their seconds.

    With one thread they are those of its CPU time, so that neighbours count less.
    """

    def __init__(self, threads: int) -> None:
        from sensorium.runtime.runner import ModelRunner

        self.steps: list[dict[str, float]] = []
        execute: Any = ModelRunner.execute
        clock = time.thread_time if threads == 1 else time.perf_counter

        def timed(runner: Any, plan: Any) -> Any:
            began = clock()
            result = execute(runner, plan)
            self._note(plan, clock() - began)
            return result

        ModelRunner.execute = timed  # type: ignore[assignment, method-assign]

    def _note(self, plan: Any, seconds: float) -> None:
        decoding = [s for s in plan.spans if s.num_tokens == 1 and s.start > 0]
        prompts = [s for s in plan.spans if not (s.num_tokens == 1 and s.start > 0)]
        self.steps.append(
            {
                "seconds": seconds,
                "token": sum(s.num_tokens for s in prompts),
                "sequence": len(decoding),
                "context": sum(s.start for s in decoding),
                "item": len(plan.encode),
                "embedding": sum(job.num_embeds for job in plan.encode),
            }
        )


def measure(model: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Steps of a real engine: the lower quartile of the seconds of equal ones."""
    from PIL import Image

    from sensorium import LLM, SamplingParams

    recorder = _Recorder(threads)
    llm = LLM(
        model,
        num_threads=threads,
        kv_cache_memory_bytes=1 << 28,
        max_num_batched_tokens=1024,
        max_model_len=2048,
    )
    salt = 0
    for _ in range(rounds):
        for rows, length in (
            (1, 8),
            (1, 64),
            (1, 256),
            (1, 900),
            (4, 100),
            (16, 16),
            (32, 30),
            (4, 900),
        ):
            salt += 1
            prompts = [
                {
                    "prompt_token_ids": [
                        (salt * 7 + row * 13 + i * (3 + row)) % 1200 + 10 for i in range(length)
                    ]
                }
                for row in range(rows)
            ]
            params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
            llm.generate(prompts, params, use_tqdm=False)
        for number, side in ((1, 56), (1, 224), (4, 112), (2, 224)):
            salt += 1
            images = [
                Image.fromarray(
                    np.random.default_rng(salt * 100 + i).integers(
                        0, 255, (side, side, 3), np.uint8
                    )
                )
                for i in range(number)
            ]
            chats = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_pil", "image_pil": image},
                            {"type": "text", "text": "What is it?"},
                        ],
                    }
                ]
                for image in images
            ]
            params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
            llm.chat(chats, params, use_tqdm=False)
    return _merged(recorder.steps)


def _merged(steps: list[dict[str, float]]) -> list[dict[str, Any]]:
    groups: dict[tuple[float, ...], list[float]] = {}
    for step in steps:
        if not any(step[name] for name in ("token", "sequence", "item")):
            continue
        about = round(step["context"] / 64) * 64
        place = (step["token"], step["sequence"], about, step["item"], step["embedding"])
        groups.setdefault(place, []).append(step["seconds"])
    names = ("token", "sequence", "context", "item", "embedding")
    return [
        dict(zip(names, place, strict=True))
        | {"seconds": float(np.quantile(seconds, 0.25)), "count": len(seconds)}
        for place, seconds in sorted(groups.items())
        if len(seconds) > 1
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = {"model": options.model, "threads": options.threads, "rounds": options.rounds}
    report = Report("fleet-service", settings, options.output)
    steps = measure(options.model, options.threads, options.rounds)
    costs = fit(steps)
    errors = [
        costs.seconds(s["token"], s["sequence"], s["context"], s["item"], s["embedding"])
        / s["seconds"]
        - 1
        for s in steps
    ]
    report.write(
        costs=dataclasses.asdict(costs), median_error=float(np.median(np.abs(errors))), steps=steps
    )
    for name, value in dataclasses.asdict(costs).items():
        print(f"{name:<10}{value * 1e6:>12.2f} us")
    print(f"median error {np.median(np.abs(errors)):.1%}")


if __name__ == "__main__":
    main()
