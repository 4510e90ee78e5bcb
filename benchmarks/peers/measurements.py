"""What is measured, written once for all engines.

An engine offers two calls, ``complete`` (token ids in) and ``answer`` (a picture and a text in,
through the chat template); both are greedy, ignore the end of the sequence and return the number of
new tokens of each prompt. No prompt and no picture occurs twice, except where a measurement is
about repetition, so that no cache answers in place of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from benchmarks.peers.workload import Question, Workload, seed_of

PROMPT_TOKENS = 32
NEW_TOKENS = 128
SHORT_PROMPT_TOKENS = 8
SHORT_NEW_TOKENS = {1: 64, 8: 32, 32: 24}
PREFILL_TOKENS = 2048
SHORT_WARM_UP = 256
SHORT_PICTURE = (224, 224)
PICTURES_AT_ONCE = 8
PICTURE_NEW_TOKENS = 32
BATCHES = (1, 8, 32)


class Engine(Protocol):
    """What a runner wraps."""

    name: str

    def complete(self, prompts: list[list[int]], num_new: int) -> list[int]:
        """Complete all prompts at once by ``num_new`` tokens each."""
        ...

    def answer(self, questions: list[Question], num_new: int) -> list[int]:
        """Answer all questions at once with ``num_new`` tokens each."""
        ...


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number; ``better`` says which direction is good."""

    name: str
    value: float
    unit: str
    better: Literal["higher", "lower"]


Measurement = Callable[[Engine, Workload, int], Iterator[Figure]]


def warm_up(engine: Engine, workload: Workload, names: Sequence[str], *, short: bool) -> None:
    """Run each kind of work of these measurements once, unmeasured; with less work when ``short``."""
    tokens, prefill = (
        (SHORT_PROMPT_TOKENS, SHORT_WARM_UP) if short else (PROMPT_TOKENS, PREFILL_TOKENS)
    )
    for batch in BATCHES:
        if {f"decode_b{batch}", f"decode_b{batch}_short"} & set(names):
            _complete(engine, _prompts(workload, batch, tokens, "warm", batch), 4)
    if "prefill" in names:
        _complete(engine, [workload.token_ids(prefill, seed_of("warm", "prefill"))], 1)
    if PICTURE_MEASUREMENTS.keys() & set(names):
        seed = seed_of("warm", "picture")
        sizes = SHORT_PICTURE if short else ()
        _answer(engine, [workload.question(seed, seed, PROMPT_TOKENS, *sizes)], 2)


def decode(engine: Engine, workload: Workload, round_: int, *, batch: int) -> Iterator[Figure]:
    """New tokens per second over all sequences, without the time to the first token.

    The time of one new token is subtracted from that of many, each with prompts of its own.
    """
    short = min(
        _complete(
            engine, _prompts(workload, batch, PROMPT_TOKENS, "decode", batch, round_, attempt), 1
        )
        for attempt in ("short", "short again")
    )
    prompts = _prompts(workload, batch, PROMPT_TOKENS, "decode", batch, round_, "long")
    long = _complete(engine, prompts, NEW_TOKENS)
    rate = batch * (NEW_TOKENS - 1) / (long - short)
    yield Figure(f"decode_b{batch}", rate, "tok/s", "higher")


def decode_short(
    engine: Engine, workload: Workload, round_: int, *, batch: int
) -> Iterator[Figure]:
    """The same with short prompts and fewer new tokens, the fewer the more sequences."""
    num_new = SHORT_NEW_TOKENS[batch]
    prompts = {
        part: _prompts(workload, batch, SHORT_PROMPT_TOKENS, "short", batch, round_, part)
        for part in ("first", "all")
    }
    first = _complete(engine, prompts["first"], 1)
    rate = batch * (num_new - 1) / (_complete(engine, prompts["all"], num_new) - first)
    yield Figure(f"decode_b{batch}", rate, "tok/s", "higher")


def prefill(engine: Engine, workload: Workload, round_: int) -> Iterator[Figure]:
    """Prompt tokens per second of one long prompt, up to and with its first new token."""
    seconds = _complete(engine, [workload.token_ids(PREFILL_TOKENS, seed_of("prefill", round_))], 1)
    yield Figure(f"prefill_{PREFILL_TOKENS}", PREFILL_TOKENS / seconds, "tok/s", "higher")


def image(engine: Engine, workload: Workload, round_: int) -> Iterator[Figure]:
    """Seconds to the first token.

    Of a new picture, the same request again, the picture with another text.
    """
    seed, other = seed_of("image", round_), seed_of("image", round_, "other text")
    first = _answer(engine, [workload.question(seed, seed, PROMPT_TOKENS)], 1)
    yield Figure("image_first", first, "s", "lower")
    same = _answer(engine, [workload.question(seed, seed, PROMPT_TOKENS)], 1)
    yield Figure("image_repeat_same_text", same, "s", "lower")
    other_text = _answer(engine, [workload.question(seed, other, PROMPT_TOKENS)], 1)
    yield Figure("image_repeat_other_text", other_text, "s", "lower")


def images(engine: Engine, workload: Workload, round_: int) -> Iterator[Figure]:
    """Seconds until several questions about different pictures, asked at once, are answered."""
    seeds = [seed_of("images", round_, index) for index in range(PICTURES_AT_ONCE)]
    questions = [workload.question(seed, seed, PROMPT_TOKENS) for seed in seeds]
    seconds = _answer(engine, questions, PICTURE_NEW_TOKENS)
    yield Figure(f"images_x{PICTURES_AT_ONCE}", seconds, "s", "lower")


TEXT_MEASUREMENTS: dict[str, Measurement] = {
    **{f"decode_b{batch}": partial(decode, batch=batch) for batch in BATCHES},
    "prefill": prefill,
}
PICTURE_MEASUREMENTS: dict[str, Measurement] = {"image": image, "images": images}
SHORT_MEASUREMENTS: dict[str, Measurement] = {
    f"decode_b{batch}_short": partial(decode_short, batch=batch) for batch in BATCHES
}
MEASUREMENTS = {**TEXT_MEASUREMENTS, **PICTURE_MEASUREMENTS, **SHORT_MEASUREMENTS}


def first_token(engine: Engine, workload: Workload) -> None:
    """What a freshly started engine is asked: one short prompt, one token."""
    _complete(engine, _prompts(workload, 1, PROMPT_TOKENS, "start"), 1)


def _prompts(workload: Workload, batch: int, num_tokens: int, *seed: object) -> list[list[int]]:
    return [workload.token_ids(num_tokens, seed_of(*seed, index)) for index in range(batch)]


def _complete(engine: Engine, prompts: list[list[int]], num_new: int) -> float:
    start = time.perf_counter()
    made = engine.complete(prompts, num_new)
    seconds = time.perf_counter() - start
    return _checked(seconds, made, len(prompts), num_new)


def _answer(engine: Engine, questions: list[Question], num_new: int) -> float:
    start = time.perf_counter()
    made = engine.answer(questions, num_new)
    seconds = time.perf_counter() - start
    return _checked(seconds, made, len(questions), num_new)


def _checked(seconds: float, made: list[int], num_prompts: int, num_new: int) -> float:
    if made != [num_new] * num_prompts:
        raise RuntimeError(f"asked for {num_prompts} times {num_new} tokens, got {made}")
    return seconds
