"""What each format of weights and KV cache costs: perplexity, agreement, right answers of the demo.

    python -m benchmarks.quality --model FOLDER [--text FILE] [--formats NAME ...] [--output FILE]

FOLDER holds a checkpoint, such as the one that ``benchmarks.smollm2`` makes; without it only the
demo is measured. The text is cut into windows, which the engine computes as prompts with
log-probabilities. Agreement: the share of tokens whose most likely successor is the one of float32.
Its answers are continued greedily, too, from the first tokens of each window: how many tokens are
those of float32 before the first other one. The demo answers questions about images that it was not
trained on, with the formats for its decoder and its vision tower; answers equal the truth exactly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluate import Question, draw_questions, messages_of

from benchmarks.harness import ROOT, Report, flag, settings_from_flags
from sensorium import LLM, SamplingParams
from sensorium.models.loading import calibrate

HALF = {"dtype": "bfloat16"}
FORMATS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": HALF,
    "KV cache int8": {**HALF, "kv_cache_dtype": "int8"},
    "int8, head bfloat16": {**HALF, "quantization": "int8", "quantization_head": "none"},
    "int8": {**HALF, "quantization": "int8"},
    "int4, head bfloat16": {**HALF, "quantization": "int4", "quantization_head": "none"},
    "int4": {**HALF, "quantization": "int4"},
    "int4, errors not weighed": {**HALF, "quantization": "int4"},
    "int4, head int4": {**HALF, "quantization": "int4", "quantization_head": "int4"},
}
"""Options by name. The first is what the others are compared with."""
NOT_WEIGHED = "int4, errors not weighed"
"""Quantized without a look at the inputs of the layers, to show what that look is good for."""
DEMO = ("float32", "bfloat16", "int8", "int4")
"""Those of which the demo is measured, with and without its vision tower in the same format."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    model: str = flag("", "folder of a checkpoint")
    text: str = flag(str(ROOT / "docs" / "architecture.md"), "file whose perplexity is measured")
    formats: tuple[str, ...] = flag(tuple(FORMATS), "names of formats", choices=list(FORMATS))
    window: int = flag(512, "tokens of a prompt")
    windows: int = flag(8, "most windows", quick=2)
    prefix: int = flag(64, "tokens of a window after which a greedy answer begins")
    answer: int = flag(64, "tokens of a greedy answer", quick=8)
    questions: int = flag(
        300, "questions for each kind of image that the demo is asked; 0: none", quick=5
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model makes of a text."""

    log_probabilities: list[float]
    """Of the tokens of each window but its first."""
    likely: list[int]
    """Most likely successors of the same tokens."""
    answers: list[list[int]]
    """Greedy continuations of the beginnings of the windows."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(-sum(self.log_probabilities) / len(self.log_probabilities))


def windows_of(settings: Settings) -> list[list[int]]:
    """The text's tokens in windows of equal length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(settings.model) / "tokenizer.json"))
    ids = tokenizer.encode(Path(settings.text).read_text(encoding="utf-8")).ids
    size = settings.window
    starts = range(0, min(len(ids), settings.windows * size) - size + 1, size)
    return [ids[start : start + size] for start in starts]


def read(settings: Settings, windows: Sequence[list[int]], options: Mapping[str, str]) -> Reading:
    """Run the windows, and greedy answers to their beginnings, through the engine."""
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    greedy = SamplingParams(temperature=0, max_tokens=settings.answer, ignore_eos=True)
    chances, likely = [], []
    with LLM(
        settings.model,
        max_model_len=2 * settings.window,
        num_kv_blocks=600,
        weights_cache="off",  # weights that are not weighed have the same name there
        **options,
    ) as llm:
        prompts = [{"prompt_token_ids": window} for window in windows]
        for window, out in zip(windows, llm.generate(prompts, scored, use_tqdm=False), strict=True):
            entries = out.prompt_logprobs or []
            for token, entry in zip(window[1:], entries[1:], strict=True):
                assert entry is not None
                chances.append(entry[token].logprob)
                likely.append(max(entry, key=lambda each: entry[each].logprob))
        starts = [{"prompt_token_ids": window[: settings.prefix]} for window in windows]
        answers = [out.outputs[0].token_ids for out in llm.generate(starts, greedy, use_tqdm=False)]
    return Reading(chances, likely, answers)


@contextlib.contextmanager
def as_named(name: str) -> Iterator[None]:
    """Take the measurement of inputs away for the format that goes without it."""
    original = calibrate.mean_squares
    if name == NOT_WEIGHED:
        calibrate.mean_squares = lambda *_: {}
    try:
        yield
    finally:
        calibrate.mean_squares = original


def compared(found: Reading, first: Reading) -> dict[str, float]:
    """Figures of a reading beside the first one's."""
    same = sum(a == b for a, b in zip(found.likely, first.likely, strict=True))
    pairs = zip(found.log_probabilities, first.log_probabilities, strict=True)
    return {
        "perplexity": found.perplexity,
        "perplexity / float32": found.perplexity / first.perplexity,
        "same most likely token": same / len(first.likely),
        "mean difference of log-probabilities": sum(abs(a - b) for a, b in pairs)
        / len(found.log_probabilities),
        "tokens of greedy answers until another": sum(
            common(a, b) for a, b in zip(found.answers, first.answers, strict=True)
        )
        / len(first.answers),
    }


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def share_right(questions: Sequence[Question], options: Mapping[str, str]) -> float:
    """The share of questions that the demo answers exactly."""
    params = SamplingParams(temperature=0, max_tokens=48)
    with LLM("demo", max_model_len=1024, num_kv_blocks=2000, **options) as llm:
        chats = [messages_of(question) for question in questions]
        outs = llm.chat(chats, params, use_tqdm=False)
    right = [
        out.outputs[0].text.strip() == question.answer
        for out, question in zip(outs, questions, strict=True)
    ]
    return sum(right) / len(right)


def measure_demo(settings: Settings) -> dict[str, Any]:
    """Right answers of the demo with each format."""
    questions = draw_questions(settings.questions)
    shares: dict[str, float] = {}
    for name in DEMO:
        options = FORMATS[name]
        shares[name] = share_right(questions, options)
        print(f"demo, {name}: {shares[name]:.4f} of {len(questions)}", flush=True)
        if "quantization" in options:
            both = {**options, "quantization_towers": options["quantization"]}
            shares[f"{name}, tower {name}"] = share_right(questions, both)
            print(
                f"demo, {name}, with its tower: {shares[f'{name}, tower {name}']:.4f}", flush=True
            )
    return {"questions": len(questions), "right": shares}


def main() -> int:
    """Measure and write the results."""
    settings, output = settings_from_flags(Settings, __doc__)
    shown = {name: getattr(settings, name) for name in settings.__slots__}
    shown["model"], shown["text"] = Path(settings.model).name, Path(settings.text).name
    report = Report("quality", shown, output)
    if settings.model:
        windows, first = windows_of(settings), None
        figures: dict[str, dict[str, float]] = {}
        for name in settings.formats:
            with as_named(name):
                found = read(settings, windows, FORMATS[name])
            first = first or found
            figures[name] = compared(found, first)
            print(f"{name:<20}", {k: round(v, 4) for k, v in figures[name].items()}, flush=True)
            report.write(text={"tokens": sum(map(len, windows)), "formats": figures})
    if settings.questions:
        report.write(demo=measure_demo(settings))
    print(report.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
