"""Speculative decoding by n-grams beside decoding without it: speed, and the same tokens.

    python -m benchmarks.speculative --model FOLDER [--tasks NAME ...] [--batches N ...]
    python -m benchmarks.speculative --model FOLDER --equal 200
    python -m benchmarks.speculative --model FOLDER --control [--tasks NAME ...] [--batches N ...]

FOLDER holds a checkpoint with a chat template, such as the one that ``benchmarks.smollm2`` makes.
Two engines with the same weights, in one process and thread, answer the same prompts at the same
time, in turns of ``TURN`` seconds; each has a clock that runs in its own turns alone. So whatever
else slows the machine down slows both. Times are those from the first token of the last answer to
begin, so prompts are not counted: "all" is all tokens until the last answer has ended, when few
sequences may be left, "each" the geometric mean of the speeds of the answers. Every answer has its
full length. The ratio of a task is the median of those of its rounds; the range is that of all.
Before the rounds of a number of sequences, those of one task run once and are not counted. With
``--control`` both engines run without speculation: what their speeds differ by is no effect of it,
but of the machine, and of where the weights lie in memory. Results are appended to the file of
results where it exists, so that a long comparison can be cut up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, Report, add_flags, figures_table, flag, in_turn, settings_of
from sensorium import RequestOutput, SamplingParams
from sensorium.config import engine_config
from sensorium.engine.offline.batch import BatchBuilder, conversations
from sensorium.engine.offline.engine import OfflineEngine
from sensorium.engine.prompts.types import chat_prompt

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
TURN = 0.1
"""Seconds for which one engine runs before the other has its turn."""
WARM_UP = "a page repeated"
"""Task of the round that is not counted: many tokens are tried in it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    model: str = flag("demo", "folder of a checkpoint")
    dtype: str = flag("bfloat16", "type of activations")
    quantization: str = flag("", "format of the weights")
    tasks: tuple[str, ...] = flag(tuple(TASKS), "tasks", choices=list(TASKS))
    batches: tuple[int, ...] = flag((1, 8), "sequences at a time", quick=(2,))
    tokens: int = flag(96, "tokens of an answer", quick=8)
    rounds: int = flag(4, "rounds", quick=1)
    threads: int = flag(1, "threads of the engine")
    most: int = flag(8, "most tokens that are tried (num_speculative_tokens)")


class Side:
    """One of the two engines."""

    def __init__(self, name: str, settings: Settings) -> None:
        options: dict[str, Any] = {}
        if name == "ngram":
            options = {"speculative": "ngram", "num_speculative_tokens": settings.most}
        self.engine = OfflineEngine.build(
            engine_config(
                model=settings.model,
                dtype=settings.dtype,
                quantization=settings.quantization or None,
                num_threads=settings.threads,
                max_model_len=1024,
                enable_prefix_caching=False,
                **options,
            )
        )
        self._batches = BatchBuilder(self.engine.input_processor, self.engine.loop)

    def answers(
        self, prompts: Sequence[str], settings: Settings, task: Task
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Yield index and output of a prompt whenever its answer grows, as the engine runs."""
        params = [
            SamplingParams(
                temperature=task.temperature,
                seed=number,
                max_tokens=settings.tokens,
                ignore_eos=True,
                prediction=task.expected(prompt) if task.expected else None,
            )
            for number, prompt in enumerate(prompts)
        ]
        chats = conversations([[{"role": "user", "content": prompt}] for prompt in prompts])
        for index, output in self.engine.updates(self._batches.text(chats, chat_prompt, params)):
            assert isinstance(output, RequestOutput)
            yield index, output

    def tried(self) -> tuple[int, int]:
        """Return how many tokens were tried so far, and how many of them were right."""
        stats = self.engine.stats()
        return stats.num_draft_tokens, stats.num_accepted_tokens


class Run:
    """One engine on its way through some prompts, with a clock of its own."""

    def __init__(self, side: Side, prompts: Sequence[str], settings: Settings, task: Task) -> None:
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.is_done = False
        self._answers = side.answers(prompts, settings, task)
        self._clock = 0.0
        self._begun: dict[int, float] = {}
        self._ended: dict[int, float] = {}

    def turn(self) -> None:
        """Run for ``TURN`` seconds, or to the end."""
        started = time.perf_counter()
        for index, output in self._answers:
            now = self._clock + time.perf_counter() - started
            self._begun.setdefault(index, now)
            if output.finished:
                self._ended[index] = now
                self.token_ids[index] = list(output.outputs[0].token_ids)
            if now - self._clock > TURN:
                self._clock = now
                return
        self.is_done = True

    def seconds(self) -> list[float]:
        """Return for each answer the seconds from the last first token of all to its end."""
        begin = max(self._begun.values())
        return [end - begin for end in self._ended.values()]


def answers(side: Side, prompts: Sequence[str], settings: Settings, task: Task) -> list[list[int]]:
    """Return the tokens of the answers to some prompts."""
    run = Run(side, prompts, settings, task)
    while not run.is_done:
        run.turn()
    return run.token_ids


def round_of(
    sides: dict[str, Side], first: int, prompts: Sequence[str], settings: Settings, task: Task
) -> dict[str, Run]:
    """Let both engines answer the prompts in turns; which begins is the ``first`` of them."""
    runs = {name: Run(sides[name], prompts, settings, task) for name in in_turn(SIDES, first)}
    while not all(run.is_done for run in runs.values()):
        for run in runs.values():
            if not run.is_done:
                run.turn()
    return runs


def compare(sides: dict[str, Side], name: str, batch: int, settings: Settings) -> dict[str, Any]:
    """Measure one task with one number of sequences."""
    task, figures = TASKS[name], Figures()
    draw = random.Random(f"{name} {batch}")
    same, before = True, sides["ngram"].tried()
    ratios: dict[str, list[float]] = {"all": [], "each": []}
    for round_ in range(settings.rounds):
        prompts = [task.prompt(draw) for _ in range(batch)]
        runs = round_of(sides, round_, prompts, settings, task)
        speeds: dict[str, dict[str, float]] = {"all": {}, "each": {}}
        for side, run in runs.items():
            seconds, num_tokens = run.seconds(), settings.tokens - 1
            speeds["all"][side] = batch * num_tokens / max(seconds)
            speeds["each"][side] = statistics.geometric_mean(num_tokens / s for s in seconds)
        for figure, by_side in speeds.items():
            ratios[figure].append(by_side["ngram"] / by_side["plain"])
            for side, speed in by_side.items():
                figures.note(figure, side, speed, "tokens/s", "higher")
        same = same and runs["ngram"].token_ids == runs["plain"].token_ids
    tried, right = (now - then for now, then in zip(sides["ngram"].tried(), before, strict=True))
    summary = figures.summary("ngram")
    middle = {figure: statistics.median(each) for figure, each in ratios.items()}
    print(f"{name}, {batch} at a time: {right} of {tried} tried tokens right", flush=True)
    print(figures_table(summary, SIDES, "ngram"), "" if same else "  OTHER TOKENS", flush=True)
    print(f"median of the rounds: all {middle['all']:.3f}, each {middle['each']:.3f}", flush=True)
    return {
        "task": name,
        "batch": batch,
        "rounds": settings.rounds,
        "same_tokens": same,
        "tried": tried,
        "right": right,
        "ratio": middle,
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
            for output in answers(
                sides[side], prompts[start : start + AT_ONCE], settings, greedy[0]
            )
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
    parser.add_argument("--control", action="store_true", help="measure two engines without it")
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
    sides = {name: Side("plain" if options.control else name, settings) for name in SIDES}
    try:
        if options.equal:
            compared.append({**with_quantization, **equal(sides, options.equal, settings)})
            report.write(runs=runs, equal=compared)
            return 0
        for batch in settings.batches:
            compare(sides, WARM_UP, batch, dataclasses.replace(settings, rounds=1))
            for name in settings.tasks:
                found = compare(sides, name, batch, settings)
                found = {"threads": settings.threads, "control": options.control, **found}
                runs.append({**with_quantization, **found})
                report.write(runs=runs, equal=compared)
    finally:
        for side in sides.values():
            side.engine.close()
    print(report.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
