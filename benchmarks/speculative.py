"""Speculative decoding by n-grams beside decoding without it: speed, and the same tokens.

    python -m benchmarks.speculative --model FOLDER [--tasks NAME ...] [--batches N ...]
    python -m benchmarks.speculative --model FOLDER --equal 200

FOLDER holds a checkpoint with a chat template, such as the one that ``benchmarks.smollm2`` makes.
Two engines with the same weights answer the same prompts in turn. Times are those from the first
token of the last answer to begin, so prompts are not counted: "decode" is all tokens until the last
answer has ended, when few sequences may be left, "a sequence" the geometric mean of the speeds of
the answers. Every answer has its full length. Results are appended to the file of results where it exists, so that a long
comparison can be cut up; ratios are within one run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, Report, add_flags, figures_table, flag, in_turn, settings_of
from sensorium import LLM, RequestOutput, SamplingParams

WORDS = (
    "harbour lantern copper meadow signal orchard granite ferry winter market paper bridge garden "
    "silver window letter kitchen river music station forest bottle engine shadow summer candle"
).split()
NAMES = "Ada Boris Chloe Dmitri Elena Farid Greta Hugo Ida Jonas Kira Liam Mona Nils".split()
CITIES = "Lisbon Oslo Krakow Turin Ghent Malaga Dublin Graz".split()


def sentence(draw: random.Random) -> str:
    """A sentence of random words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(6, 11))).capitalize() + "."


def records(draw: random.Random) -> str:
    """A prompt that asks for the data of a text as JSON."""
    people = [
        f"{draw.choice(NAMES)} {draw.choice(WORDS).capitalize()} is {draw.randint(18, 80)} years "
        f"old and lives in {draw.choice(CITIES)}."
        for _ in range(5)
    ]
    example = '[{"name": "Eva Stone", "age": 30, "city": "Paris"}, {"name": "Max Reed", '
    return (
        f"{' '.join(people)}\n\nWrite the people of this text as a JSON list of objects with name, "
        f'age and city, such as {example}"age": 41, "city": "Rome"}}]. Write only the JSON.'
    )


def page(draw: random.Random) -> str:
    """A prompt that asks for a text to be repeated, as reading a page does."""
    text = " ".join(sentence(draw) for _ in range(12))
    return f"Repeat the following text word for word:\n\n{text}"


def code(draw: random.Random) -> str:
    """A prompt that asks for a small change of a program."""
    first, second, third = draw.sample(WORDS, 3)
    lines = [
        f"def {first}_{second}(values, limit={draw.randint(3, 90)}):",
        f'    """Return the {third} of the values up to a limit."""',
        "    total = 0",
        "    for index, value in enumerate(values):",
        f"        if value > limit or index == {draw.randint(2, 9)}:",
        "            continue",
        f"        total += value * {draw.randint(2, 9)}",
        f'    print("{first}", total)',
        "    return total",
    ]
    source = "\n".join(lines)
    task = "Rename `total` to `result` and write the whole program again"
    return f"{task}:\n\n```python\n{source}\n```"


def story(draw: random.Random) -> str:
    """A prompt whose answer repeats little of it."""
    first, second = draw.sample(WORDS, 2)
    return f"Tell a long story about a {first} and a {second} in {draw.choice(CITIES)}."


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, and how answers are drawn."""

    prompt: Callable[[random.Random], str]
    temperature: float = 0.0
    expected: Callable[[str], str] | None = None
    """What of a prompt is given as the expected answer."""


def program(prompt: str) -> str:
    """The program in a prompt, with the lines around it that the answer has, too."""
    return prompt[prompt.index("```python") :]


TASKS = {
    "JSON from a text": Task(records),
    "a page repeated": Task(page),
    "a change of code": Task(code),
    "a change of code, expected": Task(code, expected=program),
    "a story": Task(story),
    "a story, drawn": Task(story, temperature=1.0),
    "noise": Task(story, temperature=3.0),
}
"""The last is as good as random: nothing that repeats is right."""
SIDES = ("ngram", "plain")
AT_ONCE = 4
"""Sequences at a time of which tokens are compared: few, so that many tokens are tried."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    model: str = flag("demo", "folder of a checkpoint")
    dtype: str = flag("bfloat16", "type of activations")
    quantization: str = flag("", "format of the weights")
    tasks: tuple[str, ...] = flag(tuple(TASKS), "tasks", choices=list(TASKS))
    batches: tuple[int, ...] = flag((1, 8), "sequences at a time", quick=(2,))
    tokens: int = flag(96, "tokens of an answer", quick=8)
    rounds: int = flag(2, "rounds, after one that is not counted", quick=1)
    threads: int = flag(1, "threads of the engine")
    most: int = flag(8, "most tokens that are tried (num_speculative_tokens)")


class Side:
    """One of the two engines."""

    def __init__(self, name: str, settings: Settings) -> None:
        options: dict[str, Any] = {}
        if name == "ngram":
            options = {"speculative": "ngram", "num_speculative_tokens": settings.most}
        self.llm = LLM(
            settings.model,
            dtype=settings.dtype,
            quantization=settings.quantization or None,
            num_threads=settings.threads,
            max_model_len=1024,
            enable_prefix_caching=False,
            **options,
        )

    def answer(
        self, prompts: list[str], tokens: int, task: Task
    ) -> tuple[list[RequestOutput], list[float]]:
        """Return answers, and for each the seconds from the last first token of all to its end."""
        params = [
            SamplingParams(
                temperature=task.temperature,
                seed=number,
                max_tokens=tokens,
                ignore_eos=True,
                prediction=task.expected(prompt) if task.expected else None,
            )
            for number, prompt in enumerate(prompts)
        ]
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        outputs = self.llm.chat(conversations, params, use_tqdm=False)
        times = [output.metrics for output in outputs if output.metrics is not None]
        begin = max(each.first_token_time or 0.0 for each in times)
        return outputs, [(each.finished_time or 0.0) - begin for each in times]

    def tried(self) -> tuple[int, int]:
        """Return how many tokens were tried so far, and how many of them were right."""
        stats = self.llm.stats()
        return stats.num_draft_tokens, stats.num_accepted_tokens


def compare(sides: dict[str, Side], name: str, batch: int, settings: Settings) -> dict[str, Any]:
    """Measure one task with one number of sequences."""
    task, figures = TASKS[name], Figures()
    draw = random.Random(f"{name} {batch}")
    same, before = True, sides["ngram"].tried()
    for round_ in range(settings.rounds + 1):
        prompts = [task.prompt(draw) for _ in range(batch)]
        found = {}
        for side in in_turn(SIDES, round_):
            outputs, seconds = sides[side].answer(prompts, settings.tokens, task)
            found[side] = [output.outputs[0].token_ids for output in outputs]
            num_tokens = settings.tokens - 1
            if round_:
                all_of_them = batch * num_tokens / max(seconds)
                figures.note("decode", side, all_of_them, "tokens/s", "higher")
                speed = statistics.geometric_mean(num_tokens / each for each in seconds)
                figures.note("a sequence", side, speed, "tokens/s", "higher")
        same = same and found["ngram"] == found["plain"]
    tried, right = (now - then for now, then in zip(sides["ngram"].tried(), before, strict=True))
    summary = figures.summary("ngram")
    print(f"{name}, {batch} at a time: {right} of {tried} tried tokens right", flush=True)
    print(figures_table(summary, SIDES, "ngram"), "" if same else "  OTHER TOKENS", flush=True)
    return {
        "task": name,
        "batch": batch,
        "same_tokens": same,
        "tried": tried,
        "right": right,
        **summary,
    }


def equal(sides: dict[str, Side], number: int, settings: Settings) -> dict[str, Any]:
    """Compare greedy tokens of as many prompts of all greedy tasks."""
    draw = random.Random(7)
    greedy = [task for task in TASKS.values() if task.temperature == 0.0 and not task.expected]
    prompts = [greedy[index % len(greedy)].prompt(draw) for index in range(number)]
    before = sides["ngram"].tried()
    found = {}
    for side in SIDES:
        found[side] = [
            output.outputs[0].token_ids
            for start in range(0, number, AT_ONCE)
            for output in sides[side].answer(
                prompts[start : start + AT_ONCE], settings.tokens, greedy[0]
            )[0]
        ]
    tried, right = (now - then for now, then in zip(sides["ngram"].tried(), before, strict=True))
    num_equal = sum(a == b for a, b in zip(found["ngram"], found["plain"], strict=True))
    print(f"{num_equal} of {number} answers are the same, {right} of {tried} tried tokens right")
    return {"prompts": number, "same": num_equal, "tried": tried, "right": right}


def main() -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, [Settings])
    parser.add_argument(
        "--equal", type=int, default=0, help="only compare tokens of so many prompts"
    )
    parser.add_argument("--quick", action="store_true", help="a trial whose figures mean nothing")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = settings_of(Settings, options, quick=options.quick)
    shown = {name: getattr(settings, name) for name in settings.__slots__}
    shown["model"] = Path(settings.model).name
    report = Report("speculative", shown, options.output)
    earlier = json.loads(report.path.read_text()) if report.path.exists() else {}
    runs, compared = list(earlier.get("runs", [])), list(earlier.get("equal", []))
    with_quantization = {"quantization": settings.quantization or settings.dtype}
    sides = {name: Side(name, settings) for name in SIDES}
    try:
        if options.equal:
            compared.append({**with_quantization, **equal(sides, options.equal, settings)})
            report.write(runs=runs, equal=compared)
            return 0
        for batch in settings.batches:
            for name in settings.tasks:
                found = compare(sides, name, batch, settings)
                runs.append({**with_quantization, "threads": settings.threads, **found})
                report.write(runs=runs, equal=compared)
    finally:
        for side in sides.values():
            side.llm.close()
    print(report.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
