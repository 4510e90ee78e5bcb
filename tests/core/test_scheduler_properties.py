"""Whatever comes, in whatever order and room: the right tokens, in a bounded number of steps.

``Driver`` checks the integrity of all books after every operation, and ``FakeRunner`` that each
plan can be carried out and that each block contains what the plan takes from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sensorium.core.request import EngineRequest, ItemSpan
from sensorium.core.speculation.speculator import SpeculationLimits
from sensorium.errors import MediaTooLargeError, PromptTooLongError
from tests.core.driver import PLACEHOLDER, Driver, pooling_request, request
from tests.fakes import expected_prompt_logprobs, expected_tokens, expected_vector

VOCAB_SIZE = 6
ITEM_RUNS = {b"dot": (1,), b"cat": (3,), b"clip": (2, 2), b"map": (7,)}
"""Lengths of the runs of each item, one separator between them."""

texts = st.lists(st.integers(0, 2), min_size=1, max_size=4)
parts = st.lists(st.one_of(texts, st.sampled_from(sorted(ITEM_RUNS))), min_size=2, max_size=5)


@dataclass(frozen=True)
class Add:
    parts: tuple[Any, ...]
    num_samples: int
    options: dict[str, Any]
    pools: bool = False


@dataclass(frozen=True)
class Step:
    abort_midway: int | None = None


@dataclass(frozen=True)
class Abort:
    number: int


@dataclass(frozen=True)
class Fail:
    """Let a request or an item fail from here on."""

    number: int | None = None
    item: bytes | None = None


adds = st.builds(
    Add,
    parts=parts.map(tuple),
    num_samples=st.sampled_from([1, 1, 1, 2, 5]),
    options=st.fixed_dictionaries(
        {"max_tokens": st.integers(1, 9)},
        optional={
            "eos": st.just((0,)),
            "stop_token_ids": st.just([1]),
            "min_tokens": st.just(1),
            "salt": st.sampled_from([b"", b"tenant"]),
            "priority": st.integers(-1, 1),
            "rope": st.sampled_from([(0, 9), (5, 9), (8, 9)]),
            "prompt_logprobs": st.just(0),
        },
    ),
)
pooling_adds = st.builds(
    Add,
    parts=parts.map(tuple),
    num_samples=st.sampled_from([1, 1, 2]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "salt": st.sampled_from([b"", b"tenant"]),
            "priority": st.integers(-1, 1),
            "rope": st.sampled_from([(0, 9), (5, 9), (8, 9)]),
        },
    ),
    pools=st.just(True),
)
numbers = st.integers(0, 30)
steps = st.one_of(st.just(Step()), st.just(Step()), st.builds(Step, abort_midway=numbers))
quiet_operations = st.lists(
    st.one_of(adds, adds, pooling_adds, st.just(Step())), min_size=4, max_size=14
)
failures = st.one_of(
    st.builds(Fail, number=numbers), st.builds(Fail, item=st.sampled_from(sorted(ITEM_RUNS)))
)
rough_operations = st.lists(
    st.one_of(adds, adds, adds, pooling_adds, steps, steps, st.builds(Abort, numbers), failures),
    min_size=6,
    max_size=25,
)
tight_limits = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 5),
        "max_num_batched_tokens": st.sampled_from([1, 2, 5, 11, 20, 40]),
        "max_model_len": st.sampled_from([10, 30, 60]),
        "num_blocks": st.integers(6, 24),
        "block_size": st.integers(1, 4),
        "encode_budget": st.sampled_from([4, 7, 8, 14]),
        "encoder_cache_size": st.sampled_from([4, 7, 8, 11, 20]),
        "enable_prefix_caching": st.booleans(),
        "enable_chunked_prefill": st.booleans(),
        "window": st.sampled_from([None, None, 1, 3, 8]),
        "speculation": st.sampled_from(
            [None, SpeculationLimits(num_tokens=4, shortest=1, longest=3)]
        ),
    }
)


def build(name: str, add: Add) -> EngineRequest:
    ids: list[int] = []
    items: list[ItemSpan] = []
    for part in add.parts:
        if isinstance(part, bytes):
            runs = []
            for length in ITEM_RUNS[part]:
                if runs:
                    ids.append(3)
                runs.append((len(ids), length))
                ids += [PLACEHOLDER] * length
            items.append(ItemSpan(part, "image", tuple(runs)))
        else:
            ids += part
    make = pooling_request if add.pools else request
    return make(name, ids, items=items, **add.options)


class Scenario:
    """Carries out operations and remembers what may be missing from the outcomes."""

    def __init__(self, limits: dict[str, Any]) -> None:
        self.driver = Driver(vocab_size=VOCAB_SIZE, **limits)
        self.requests: list[EngineRequest] = []
        self.aborted: set[str] = set()

    def carry_out(self, operation: object) -> None:
        match operation:
            case Add():
                for _ in range(operation.num_samples):
                    self.add(build(f"r{len(self.requests)}", operation))
            case Step(None):
                self.driver.step()
            case Step(int(number)):
                name = self.name(number)
                self.driver.step(abort_midway=name)
                self.aborted.add(name)
            case Abort():
                self.driver.abort(self.name(operation.number))
                self.aborted.add(self.name(operation.number))
            case Fail(int(number), _):
                self.driver.runner.fail_requests.add(self.name(number))
            case Fail(_, bytes(digest)):
                self.driver.runner.fail_items.add(digest)

    def add(self, new: EngineRequest) -> None:
        try:
            self.driver.add(new)
        except (PromptTooLongError, MediaTooLargeError):
            self.driver.scheduler.check_integrity()
            return
        self.requests.append(new)

    def name(self, number: int) -> str:
        return f"r{number % max(1, len(self.requests))}"

    def finish(self) -> None:
        """Everything that was admitted ends within so many steps."""
        work = sum(len(r.token_ids) + r.max_tokens + r.rope_border + 2 for r in self.requests)
        self.driver.run(max_steps=2 * work + 2)
        self.driver.scheduler.check_integrity()

    def num_computed(self, wanted: EngineRequest) -> tuple[int, int]:
        """Tokens to compute for a request that ended, and those of them to compute again as its
        factors changed.
        """
        num_generated = len(self.driver.outcomes[wanted.request_id].token_ids)
        prompt, most = len(wanted.token_ids), wanted.rope_border
        changed = bool(wanted.rope_length) and prompt <= most < prompt + num_generated - 1
        return prompt + max(0, num_generated - 1), most if changed else 0

    def check_tokens(self, wanted: EngineRequest) -> None:
        driver, outcome = self.driver, self.driver.outcomes[wanted.request_id]
        if wanted.pooling is not None:
            vectors = [
                update.embedding for update in outcome.updates if update.finish_reason == "stop"
            ]
            assert vectors in ([], [expected_vector(wanted)])
            assert not outcome.token_ids
            assert len(outcome.updates) <= 1, "one piece of news, which ends it"
            return
        alone = expected_tokens(
            wanted,
            vocab_size=VOCAB_SIZE,
            max_model_len=min(driver.limits.max_model_len, driver.limits.num_cache_tokens + 1),
        )
        assert outcome.token_ids == alone[: len(outcome.token_ids)]
        if outcome.updates and wanted.params.prompt_logprobs is not None and outcome.token_ids:
            assert outcome.updates[0].prompt_logprobs == expected_prompt_logprobs(wanted)
        if outcome.finish_reason in ("stop", "length"):
            assert outcome.token_ids == alone
            ends = {*wanted.eos_token_ids, *wanted.params.stop_token_ids}
            assert (outcome.finish_reason == "stop") == (alone[-1] in ends)


def quick(num_examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=num_examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@quick(200)
@given(tight_limits, quiet_operations)
def test_every_request_gets_the_tokens_that_it_would_get_alone(
    limits: dict[str, Any], operations: list[object]
) -> None:
    scenario = Scenario(limits)
    for operation in operations:
        scenario.carry_out(operation)
    scenario.finish()
    for wanted in scenario.requests:
        assert scenario.driver.outcomes[wanted.request_id].finish_reason in ("stop", "length")
        scenario.check_tokens(wanted)


@quick(200)
@given(tight_limits, rough_operations)
def test_aborts_and_failures_harm_nobody_else(
    limits: dict[str, Any], operations: list[object]
) -> None:
    scenario = Scenario(limits)
    for operation in operations:
        scenario.carry_out(operation)
    scenario.finish()
    runner = scenario.driver.runner
    for wanted in scenario.requests:
        scenario.check_tokens(wanted)
        name = wanted.request_id
        reads = {item.digest for item in wanted.items}
        may_fail = name in runner.fail_requests or bool(reads & runner.fail_items)
        reason = scenario.driver.outcomes[name].finish_reason
        if name not in scenario.aborted:
            assert reason in ("stop", "length") or (reason == "error" and may_fail)


@quick(60)
@given(tight_limits, quiet_operations)
def test_with_room_for_all_nothing_is_preempted_or_encoded_twice(
    limits: dict[str, Any], operations: list[object]
) -> None:
    roomy = limits | {"num_blocks": 2000, "encoder_cache_size": 100}
    scenario = Scenario(roomy)
    for operation in operations:
        scenario.carry_out(operation)
    scenario.finish()
    stats = scenario.driver.scheduler.stats()
    assert stats.num_preemptions == 0
    assert set(scenario.driver.runner.num_encoded.values()) <= {1}
    assert scenario.driver.runner.num_computed_tokens == stats.num_computed_tokens
    computed = [scenario.num_computed(wanted) for wanted in scenario.requests]
    known, again = sum(once for once, _ in computed), sum(more for _, more in computed)
    assert stats.num_embeddings == sum(r.pooling is not None for r in scenario.requests)
    num_seen = stats.num_computed_tokens + stats.num_prefix_hits
    # Of what is computed again, the cache may hold some; only the hits of a first admission are
    # counted.
    assert known <= num_seen <= known + again, "each token once"
