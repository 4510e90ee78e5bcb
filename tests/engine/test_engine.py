"""The loop over a scheduler and a fake runner, and what an interrupted step leaves."""

from __future__ import annotations

import dataclasses

import pytest

from sensorium.core.limits import SchedulerLimits
from sensorium.core.plan import StepPlan, StepResult
from sensorium.core.request import EngineRequest, ItemSpan
from sensorium.core.scheduler import Scheduler
from sensorium.engine.engine import Engine
from sensorium.engine.grammar.matchers import Matchers
from sensorium.engine.stats import EngineFacts
from sensorium.multimodal.items import Features
from sensorium.params import SamplingParams
from sensorium.runtime.encoder import FeatureStore
from tests.fakes import EMBED_BYTES, FakeRunner, expected_tokens

FACTS = EngineFacts(64, 16, 4, 8, "cpu", "float32", 1, 0.0, EMBED_BYTES)
FEATURES = Features("image", {}, 5, {})


class Interrupted(FakeRunner):
    """Stops in the middle of step ``at``, its plan carried out or not."""

    at = -1
    carried_out = False

    def execute(self, plan: StepPlan) -> StepResult:
        if len(self.plans) != self.at:
            return super().execute(plan)
        self.at = -1
        if self.carried_out:
            super().execute(plan)
        raise KeyboardInterrupt


def new_engine() -> tuple[Engine, Interrupted]:
    limits = SchedulerLimits(
        max_num_seqs=3,
        max_num_batched_tokens=8,
        max_model_len=40,
        num_blocks=16,
        block_size=4,
        encode_budget=8,
        encoder_cache_size=8,
    )
    runner = Interrupted(block_size=4, num_blocks=16, encoder_cache_size=8, encode_budget=8)
    return Engine(Scheduler(limits), runner, FeatureStore(), FACTS, Matchers("", 1)), runner


def request(name: str, first: int) -> EngineRequest:
    return EngineRequest(
        name,
        tuple(range(first, first + 9)),
        SamplingParams(),
        max_tokens=6,
        items=(ItemSpan(f"item {first}".encode(), "image", ((1, 5),)),),
    )


def run(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for one in requests:
        engine.add(one, (FEATURES,))
    while engine.has_work:
        for update in engine.step():
            assert update.sample is not None
            tokens[update.request_id].append(update.sample.token_id)
    engine.check_integrity()
    return tokens


@pytest.mark.parametrize("carried_out", [False, True])
@pytest.mark.parametrize("at", range(6))
def test_after_a_reset_the_engine_is_as_new(at: int, carried_out: bool) -> None:
    engine, runner = new_engine()
    runner.at, runner.carried_out = at, carried_out
    with pytest.raises(KeyboardInterrupt):
        run(engine, [request(f"first {i}", 10 * i) for i in range(5)])
    engine.reset()
    engine.check_integrity()
    assert not engine.has_work
    assert runner.num_held == 0
    assert not runner.resident
    again = [request(f"second {i}", 10 * i) for i in range(5)]
    assert run(engine, again) == {r.request_id: expected_tokens(r) for r in again}


def test_features_are_held_until_the_request_ends() -> None:
    engine, _ = new_engine()
    engine.add(request("a", 0), (FEATURES,))
    engine.add(request("b", 50), (FEATURES,))
    assert engine.stats().held_features == 2
    engine.abort("a")
    engine.abort("a")
    assert engine.stats().held_features == 1
    with pytest.raises(ValueError, match="1 items, but 0 features"):
        engine.add(request("c", 0))
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    assert engine.stats().held_features == 0


def test_what_encoding_costs_and_what_is_kept_of_it() -> None:
    engine, runner = new_engine()
    runner.fail_items = {b"item 90"}
    requests = [request(name, first) for name, first in (("a", 0), ("b", 20), ("c", 50), ("d", 90))]
    requests[1] = dataclasses.replace(requests[1], items=requests[0].items)
    for one in requests:
        engine.add(one, (FEATURES,))
    for _ in range(100):
        engine.step()
    assert not engine.has_work
    stats = engine.stats()
    assert (stats.encoder_queries, stats.encoder_hits) == (4, 1), "b's item was a's"
    assert (stats.encode_items, stats.encode_failures, stats.encode_seconds) == (2, 1, 0.75)
    assert stats.encode_num_bytes == 2 * 5 * EMBED_BYTES
    assert stats.encoder_capacity_bytes == 8 * EMBED_BYTES
    assert stats.encoder_num_bytes == stats.encoder_resident_embeds * EMBED_BYTES
    assert stats.encoder_evictions == 2, "there is room for one item of five embeddings"
    assert (stats.prompt_tokens, stats.item_tokens) == (36, {"image": 20})
    engine.reset()
    assert engine.stats().encode_items == 2, "counters go on"
