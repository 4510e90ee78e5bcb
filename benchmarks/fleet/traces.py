"""Traces of requests, shaped like published ones.

Lengths are those of ShareGPT as published with PagedAttention (Kwon et al., 2023: prompts of 161
tokens in the mean, answers of 338), drawn from log-normal distributions. System prompts and images
follow Zipf's law, conversations have several turns, and arrivals come in bursts.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import pack

from sensorium.distributed.routing import RequestKey
from sensorium.distributed.routing.key import PREFIX_LENGTHS


@dataclass(slots=True, eq=False)
class Request:
    """A request: its prompt as pieces that others may share, the answer's length, its media.

    ``prompt``: number and tokens of each piece; a number stands for a piece and all before it.
    ``media``: number and embeddings of each item. ``answer``: the number of the piece that the
    answer becomes in the next turn. ``arrival``: when a first turn is sent; a later one is sent
    ``think_seconds`` after the answer to the one before.
    """

    prompt: tuple[tuple[int, int], ...]
    media: tuple[tuple[int, int], ...]
    answer: int
    answer_tokens: int
    arrival: float = 0.0
    think_seconds: float = 0.0
    next: Request | None = None
    num_tokens: int = 0
    key: RequestKey = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = sum(tokens for _, tokens in self.prompt)
        self.key = RequestKey(
            self.num_tokens,
            tuple(self._prefixes()),
            tuple((pack("<Q", n), e) for n, e in self.media),
        )

    def _prefixes(self) -> Iterator[bytes]:
        """Digests as ``request_key`` makes them: equal for equal beginnings."""
        lengths, end = iter(PREFIX_LENGTHS), 0
        length = next(lengths)
        for number, tokens in self.prompt:
            end += tokens
            while length <= end:
                yield pack("<II", number, length)
                length = next(lengths)


@dataclass(frozen=True, slots=True)
class TraceShape:
    """What a trace is like; numbers of contents grow with the fleet, as its users do.

    Arrivals of first turns are Poisson with a rate that is ``burst`` times as high for a tenth of
    the time. ``rate``: requests per second and replica.
    """

    rate: float = 0.5
    seconds: float = 200.0
    system_prompts: float = 4.0
    system_tokens: float = 400.0
    images: float = 25.0
    image_tokens: int = 256
    with_image: float = 0.3
    zipf: float = 1.0
    turns: float = 3.5
    think_seconds: float = 15.0
    burst: float = 3.0
    most_tokens: int = 4096


class Zipf:
    """Numbers from 0, the k-th in proportion to ``1 / k ** exponent``."""

    def __init__(self, count: int, exponent: float, draw: random.Random) -> None:
        self._weights = list(itertools.accumulate(1 / k**exponent for k in range(1, count + 1)))
        self._numbers, self._draw = range(count), draw

    def __call__(self) -> int:
        """Return the next number."""
        return self._draw.choices(self._numbers, cum_weights=self._weights)[0]


def _log_normal(draw: random.Random, mean: float, sigma: float, least: int, most: int) -> int:
    value = draw.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)
    return max(least, min(most, round(value)))


class _Writer:
    """Draws conversations; numbers pieces."""

    def __init__(self, shape: TraceShape, num_replicas: int, seed: int) -> None:
        self.shape, self.draw = shape, random.Random(seed)
        self.numbers = itertools.count(1_000_000)
        num_prompts = max(8, round(shape.system_prompts * num_replicas))
        self.system = Zipf(num_prompts, shape.zipf, self.draw)
        lengths = random.Random(7)
        self.lengths = [
            _log_normal(lengths, shape.system_tokens, 0.8, 16, 1500) for _ in range(num_prompts)
        ]
        self.image = Zipf(max(50, round(shape.images * num_replicas)), shape.zipf, self.draw)
        self.shown: dict[tuple[int, int], int] = {}

    def conversation(self, arrival: float) -> Request | None:
        """Its first turn; each has all before it in its prompt. None when the first is too long."""
        shape, draw = self.shape, self.draw
        system = self.system()
        prompt, media = [(system, self.lengths[system])], []
        if draw.random() < shape.with_image:
            image = self.image()
            piece = self.shown.setdefault((system, image), next(self.numbers))
            prompt.append((piece, shape.image_tokens))
            media.append((image, shape.image_tokens))
        first: Request | None = None
        last: Request | None = None
        while True:
            prompt.append((next(self.numbers), _log_normal(draw, 161, 1.1, 4, 1024)))
            tokens = _log_normal(draw, 338, 0.9, 8, 1024)
            if sum(n for _, n in prompt) + tokens > shape.most_tokens:
                return first
            turn = Request(tuple(prompt), tuple(media), next(self.numbers), tokens, arrival)
            if last is None:
                first = turn
            else:
                turn.think_seconds = 1 + draw.expovariate(1 / shape.think_seconds)
                last.next = turn
            if draw.random() < 1 / shape.turns:
                return first
            prompt.append((turn.answer, tokens))
            last = turn


def make_trace(shape: TraceShape, num_replicas: int, seed: int = 0) -> list[Request]:
    """Return the first turns of a trace by their arrival."""
    writer = _Writer(shape, num_replicas, seed)
    draw = random.Random(seed + 1)
    base = 1 / (0.9 + 0.1 * shape.burst)
    rate = shape.rate * num_replicas / _mean_turns(shape)
    requests: list[Request] = []
    now, burst_until, next_burst = 0.0, 0.0, draw.uniform(10, 50)
    while True:
        now += draw.expovariate(rate * base * (shape.burst if now < burst_until else 1.0))
        if now > next_burst:
            burst_until, next_burst = next_burst + 5, next_burst + draw.uniform(20, 80)
        if now >= shape.seconds:
            return requests
        first = writer.conversation(now)
        if first is not None:
            requests.append(first)


def _mean_turns(shape: TraceShape) -> float:
    """Turns of a conversation in the mean; long ones end early."""
    writer = _Writer(shape, 1, 3)
    num_turns = 0
    for _ in range(500):
        turn = writer.conversation(0.0)
        while turn is not None:
            num_turns, turn = num_turns + 1, turn.next
    return num_turns / 500
