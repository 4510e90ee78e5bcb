"""While a matcher is being made, the engine goes on with everything else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import sensorium
from sensorium.core.limits import SchedulerLimits
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.core.scheduler import Scheduler
from sensorium.engine.engine import Engine
from sensorium.engine.grammar.matchers import NOT_STARTED, NUM_KEPT, ConstrainedRequests, Matchers
from sensorium.engine.outputs.stream import failure
from sensorium.engine.stats import EngineFacts
from sensorium.errors import InvalidRequestError, PromptTooLongError
from sensorium.params import SamplingParams, StructuredOutputs
from sensorium.runtime.encoder import FeatureStore
from sensorium.text.grammar.grammar import STARTING_SECONDS, Budget, GrammarVocabulary, grammar_text
from tests.fakes import FakeRunner

FACTS = EngineFacts(40, 16, 4, 8, "cpu", "float32", 1, 0.0)
DEMO = str(Path(sensorium.__file__).parent / "demo")


class Slow:
    """Makes matchers when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.made: list[str] = []

    def __call__(self, grammar: str, budget: Budget) -> Any:
        assert self.go.wait(60)
        self.made.append(grammar)
        if grammar == "bad":
            raise InvalidRequestError("it is none")
        return ("matcher of", grammar)


def new_engine(slow: Slow) -> tuple[Engine, FakeRunner]:
    limits = SchedulerLimits(
        max_num_seqs=4,
        max_num_batched_tokens=8,
        max_model_len=40,
        num_blocks=16,
        block_size=4,
        encode_budget=8,
        encoder_cache_size=8,
    )
    runner = FakeRunner(block_size=4, num_blocks=16)
    return Engine(Scheduler(limits), runner, FeatureStore(), FACTS, slow), runner


def request(name: str, grammar: str | None = None, **more: Any) -> EngineRequest:
    fields = {"token_ids": (1, 2, 3), "params": SamplingParams(), "max_tokens": 3, **more}
    return EngineRequest(request_id=name, grammar=grammar, **fields)


def run(engine: Engine) -> list[SequenceUpdate]:
    updates = []
    while engine.has_work:
        updates += engine.step()
    return updates


def test_others_go_on_while_a_matcher_is_made() -> None:
    slow = Slow()
    engine, runner = new_engine(slow)
    engine.add(request("constrained", "g"))
    engine.add(request("free"))
    ended = False
    while not ended:
        ended = any(u.finish_reason for u in engine.step() if u.request_id == "free")
    assert engine.stats().num_waiting == 1
    assert engine.has_work
    slow.go.set()
    updates = run(engine)
    assert [u.request_id for u in updates] == ["constrained"] * 3
    held = [new.request.grammar for plan in runner.plans for new in plan.new]
    assert held == [None, ("matcher of", "g")], "the runner gets the matcher, not the text"
    engine.check_integrity()


def test_an_idle_engine_waits_a_moment_and_has_no_news() -> None:
    engine, runner = new_engine(slow := Slow())
    engine.add(request("constrained", "g"))
    assert engine.step() == []
    assert not runner.plans
    slow.go.set()
    assert run(engine)[-1].finish_reason


def test_a_grammar_that_is_none_fails_its_request_alone() -> None:
    engine, _ = new_engine(slow := Slow())
    for name, grammar in (("a", "bad"), ("b", "good"), ("c", None)):
        engine.add(request(name, grammar))
    slow.go.set()
    updates = run(engine)
    assert [u for u in updates if u.request_id == "a"] == [
        SequenceUpdate("a", finish_reason="error", error=NOT_STARTED)
    ]
    assert sum(u.sample is not None for u in updates) == 6
    engine.check_integrity()


def test_an_aborted_request_never_starts() -> None:
    engine, runner = new_engine(slow := Slow())
    engine.add(request("a", "g"))
    engine.abort("a")
    engine.abort("unknown")
    assert not engine.has_work
    engine.add(request("b", "g"))
    engine.reset()
    assert not engine.has_work
    slow.go.set()
    assert run(engine) == []
    assert not runner.plans


def test_what_can_never_be_served_is_refused_at_once() -> None:
    engine, _ = new_engine(Slow())
    with pytest.raises(PromptTooLongError):
        engine.add(request("long", "g", token_ids=tuple(range(50))))
    engine.add(request("a", "g"))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add(request("a", "g"))
    engine.abort("a")
    assert not engine.has_work


def test_samples_share_what_their_grammar_is_made_of() -> None:
    matchers = Matchers(DEMO, 1313)
    grammar = grammar_text(StructuredOutputs(regex="ab"))
    one, other = matchers(grammar, Budget()), matchers(grammar, Budget())
    assert one is not other
    assert one.accept(_first(one))
    again = other.fresh()
    assert again.accept(_first(again)), "each stands where it stands"
    for number in range(NUM_KEPT + 5):
        matchers(grammar_text(StructuredOutputs(regex=f"a{number}")), Budget())
    assert len(matchers._kept) == NUM_KEPT
    with pytest.raises(InvalidRequestError):
        matchers("{}", Budget())


def test_the_samples_of_a_request_share_one_budget() -> None:
    """Else ``n`` multiplies what a grammar may cost everybody.

    A sequence that starts again does not get it anew.
    """
    given: list[Budget] = []

    def new_matcher(grammar: str, budget: Budget) -> Any:
        given.append(budget)
        return budget

    constrained = ConstrainedRequests(new_matcher)
    held = []
    for name in ("a#0", "a#1", "b", "a#2", "c#0"):
        constrained.put(request(name, "g"), ())
        held += constrained.take(30)
    budgets = [arrival.request.grammar for arrival in held]
    assert [budgets.index(budget) for budget in budgets] == [0, 0, 2, 0, 4]

    matchers = Matchers(DEMO, 1313)
    grammar = grammar_text(StructuredOutputs(regex="ab"))
    one, other = (matchers(grammar, budgets[0]) for _ in range(2))
    stranger = matchers(grammar, budgets[2])
    budgets[0].take(STARTING_SECONDS + 0.1)
    again = other.fresh()
    assert [m.error is None for m in (one, other, again, stranger)] == [False] * 3 + [True]


def test_a_vocabulary_that_cannot_be_read_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To send the request again is of no use, so it is no 503."""
    reads: list[str] = []

    def failing(folder: str, vocab_size: int) -> GrammarVocabulary:
        reads.append(folder)
        raise RuntimeError("no such decoder")

    monkeypatch.setattr(GrammarVocabulary, "from_folder", failing)
    constrained = ConstrainedRequests(Matchers(str(tmp_path), 10))
    for name in "ab":
        constrained.put(request(name, "g"), ())
        [arrival] = constrained.take(30)
        assert arrival.error is not None
        assert failure(arrival.error).status == 400
    assert len(reads) == 1


def _first(matcher: Any) -> int:
    import numpy as np

    words = np.zeros((1313 + 31) // 32, np.int32)
    matcher.mask(words)
    return int(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0])
