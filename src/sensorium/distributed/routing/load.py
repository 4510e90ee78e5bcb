"""Load of replicas: what they report, and what one router has sent since."""

from __future__ import annotations

from dataclasses import dataclass

from sensorium.distributed.routing.costs import RoutingCosts
from sensorium.distributed.routing.key import RequestKey


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """State of a replica, as it was last reported. What is 0 or missing is not known.

    Attributes:
        num_running: Sequences that run.
        num_waiting: Sequences that wait.
        waiting_tokens: Tokens of prompts that are still to be computed.
        kv_usage: Share of the KV cache that sequences use, 0 to 1.
        healthy: False while its engine is down, and when it drains.
        kv_tokens: Tokens that fit into the KV cache.
        computed_tokens: Tokens computed since the start, of prompts and answers.
        encoder_items: Items in the encoder cache.
        encoder_evictions: Items evicted from it since the start.
    """

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    kv_usage: float = 0.0
    healthy: bool = True
    kv_tokens: int = 0
    computed_tokens: int = 0
    encoder_items: int = 0
    encoder_evictions: int = 0


class Replica:
    """Load of one replica, as one router knows it.

    A report tells what all routers have sent. Until the next one, the router adds what it sends and
    takes away what it sees end. What it has sent itself since the report before counts in any case:
    it may be younger than the latest one.
    """

    __slots__ = (
        "_free",
        "_num_reports",
        "_num_since",
        "_open",
        "_own_new",
        "_own_old",
        "_tokens_since",
        "_uncomputed",
        "clock",
        "id",
        "load",
        "num_own",
        "num_sent",
        "number",
        "wait",
    )

    def __init__(self, id: str, number: int) -> None:
        self.id = id
        self.number = number
        self.load = ReplicaLoad()
        self.clock = 0
        self.num_own = 0
        self.num_sent = 0.0
        self._free = 0.0
        self.wait = 0.0
        self._num_since = 0
        self._num_reports = 0
        self._own_new = self._own_old = self._tokens_since = 0.0
        self._open: dict[RequestKey, int] = {}
        self._uncomputed: dict[RequestKey, list[tuple[float, int]]] = {}
        """Tokens of requests without a first token, and the report that they were sent after."""

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences that run or wait there."""
        return max(self.load.num_running + self.load.num_waiting + self._num_since, self.num_own)

    def estimate(self, costs: RoutingCosts) -> float:
        """Compute and return ``wait``: the cost of what a new request would wait for, in tokens."""
        own = self._own_new + self._own_old
        tokens = max(self.load.waiting_tokens + self._tokens_since, own)
        self.wait = tokens + costs.sequence * self.num_sequences
        usage = self.load.kv_usage
        if usage > costs.full:
            self.wait += costs.blocked * (usage - costs.full) / (1 - costs.full)
        return self.wait

    def report(self, load: ReplicaLoad) -> None:
        """Replace what was reported before."""
        self.clock += max(0, load.computed_tokens - self.load.computed_tokens)
        if not self.load.computed_tokens:
            self.clock = 0
        self.load = load
        self._free = load.kv_tokens * (1 - load.kv_usage)
        self._num_since = 0
        self._num_reports += 1
        self._own_old = self._own_new
        self._own_new = self._tokens_since = 0.0

    def trust_prefix(self, mark: int) -> float:
        """Return the probability that a prefix last used at ``mark`` of the clock is cached."""
        age = self.clock - mark
        return 1.0 if age <= self._free or not self.load.kv_tokens else self._free / age

    def trust_item(self, mark: int) -> float:
        """Return the probability that an item is, last used after ``mark`` evictions."""
        age, kept = self.load.encoder_evictions - mark, self.load.encoder_items
        return 1.0 if age <= kept else kept / age

    def sent(self, key: RequestKey, tokens: float) -> None:
        """Count a request that has ``tokens`` to compute."""
        self.num_own += 1
        self._num_since += 1
        self._own_new += tokens
        self._tokens_since += tokens
        self._open[key] = self._open.get(key, 0) + 1
        self._uncomputed.setdefault(key, []).append((tokens, self._num_reports))

    def first_token(self, key: RequestKey) -> None:
        """Count the prompt of a request as computed; nothing happens when it is not known."""
        waiting = self._uncomputed.get(key)
        if not waiting:
            return
        tokens, number = waiting.pop()
        if not waiting:
            del self._uncomputed[key]
        if number == self._num_reports:
            self._own_new -= tokens
        elif number == self._num_reports - 1:
            self._own_old -= tokens
        else:
            return  # the report tells it
        self._tokens_since -= tokens
        if not self._uncomputed:
            self._own_new = self._own_old = 0.0

    def ended(self, key: RequestKey) -> None:
        """Forget a request, whose first token may never have come."""
        num_open = self._open.get(key, 0)
        if not num_open:
            return
        if len(self._uncomputed.get(key, ())) == num_open:
            self.first_token(key)
        if num_open == 1:
            del self._open[key]
        else:
            self._open[key] = num_open - 1
        self.num_own -= 1
        self._num_since -= 1
