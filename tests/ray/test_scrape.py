"""Who answers a scrape, and who does not in time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sensorium.ray.serving import scrape
from sensorium.ray.serving.scrape import Neighbours


class Result:
    """An answer of Ray Serve that comes, fails, or never comes."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def get_async(self) -> Any:
        if self._answer is None:
            await asyncio.Event().wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def neighbours(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> Neighbours:
    """Four processes, of which these answer."""

    async def results() -> list[Result]:
        if answers and isinstance(answers[0], OSError):
            raise answers[0]
        return [Result(answer) for answer in answers]

    monkeypatch.setattr(scrape, "ANSWER_SECONDS", 0.01)
    return Neighbours("own", 4, results)


async def test_who_does_not_answer_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = neighbours(monkeypatch, ("own", []), ("a", []), RuntimeError("died"), None)
    found = await asked.ask()
    assert (found.own_name, set(found.families), found.num_missing) == ("own", {"a"}, 2)


async def test_that_nobody_can_be_asked_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await neighbours(monkeypatch, OSError("no controller")).ask()
    assert (found.families, found.num_missing) == ({}, 3)


async def test_two_generations_during_an_update_miss_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = await neighbours(monkeypatch, *((name, []) for name in "abcde")).ask()
    assert (len(found.families), found.num_missing) == (5, 0)
