"""Starts that share an application: which one ends it, and what killed ones leave."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from sensorium.config import ServedConfig, ServerConfig, engine_config
from sensorium.errors import ConfigError
from sensorium.ray.serving import claims, launch
from sensorium.ray.serving.app import Resources
from sensorium.ray.serving.claims import Claims, Phase


class World:
    """A cluster: its store, and the programs that are connected to it.

    ``job``: of the program whose code runs next.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.killed: set[str] = set()
        self.job = "own"
        self.seen = {self.job}
        self.before_put: Callable[[], None] = lambda: None

    def start(self, name: str, job: str) -> Claims:
        """A new program that notes its start."""
        made = self.program(name, job)
        made.add()
        return made

    def program(self, name: str, job: str) -> Claims:
        """A program that has not noted its start yet."""
        self.job = job
        self.seen.add(job)
        return Claims(name)

    def jobs(self) -> list[dict[str, object]]:
        place = {"DriverPid": 7, "DriverIPAddress": "10.0.0.1"}
        return [{"JobID": job, "IsDead": job in self.killed, **place} for job in self.seen]

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(get_job_id=lambda: self.job)

    def _internal_kv_put(
        self, key: str, value: bytes, overwrite: bool, *, namespace: bytes
    ) -> bool:
        call, self.before_put = self.before_put, lambda: None
        call()
        was_there = key.encode() in self.values
        if overwrite or not was_there:
            self.values[key.encode()] = value
        return was_there

    def _internal_kv_get(self, key: str | bytes, *, namespace: bytes) -> bytes | None:
        return self.values.get(key.encode() if isinstance(key, str) else key)

    def _internal_kv_del(self, key: str, *, namespace: bytes) -> int:
        return int(self.values.pop(key.encode(), None) is not None)

    def _internal_kv_list(self, prefix: str, *, namespace: bytes) -> list[bytes]:
        return [key for key in self.values if key.startswith(prefix.encode())]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(claims, "internal_kv", made)
    monkeypatch.setattr(claims, "jobs", made.jobs)
    monkeypatch.setattr(claims, "ray", made)
    return made


def test_the_latest_start_ends_an_application(world: World) -> None:
    first, second = world.start("a", "1"), world.start("a", "2")
    other = world.start("b", "3")
    assert [start.place for start in second.others()] == ["process 7 on 10.0.0.1"]
    assert not first.end(Phase.DELETING)
    assert first.ending() is None
    second.remove()
    assert [start.job for start in second.others()] == ["1"]
    assert first.end(Phase.DRAINING)
    third = world.start("a", "4")
    assert third.ending() is Phase.DRAINING
    assert not first.end(Phase.DELETING), "the third one has taken over"
    assert third.ending() is Phase.DRAINING, "and still has to replace all"
    third.deployed()
    assert third.ending() is None
    assert third.end(Phase.DELETING)
    third.clear()
    assert first.others() == third.others() == []
    assert not first.are_latest()
    assert other.are_latest()


def test_two_starts_at_a_time_get_two_numbers(world: World) -> None:
    first = world.program("a", "1")
    second = world.program("a", "2")
    world.before_put = second.add  # the first one has read the entries, and not written its own
    first.add()
    assert len(first.others()) == len(second.others()) == 1
    assert first.are_latest() != second.are_latest()


def test_a_start_that_was_killed_has_no_part_any_more(world: World) -> None:
    first, second = world.start("a", "1"), world.start("a", "2")
    assert not first.are_latest()
    world.killed.add("2")
    assert first.are_latest()
    assert first.others() == []
    assert first.end(Phase.DELETING)
    first.clear()
    second = world.start("a", "3")
    assert len(world.values) == 1, "its entry has gone with the next start"
    assert second.are_latest()


def test_what_was_draining_is_replaced_whoever_is_killed(world: World) -> None:
    """The start that drains, and the next one before it has deployed, are killed."""
    first = world.start("a", "1")
    assert first.end(Phase.DRAINING)
    world.start("a", "2")
    world.killed |= {"1", "2"}
    third = world.start("a", "3")
    assert third.ending() is Phase.DRAINING
    third.deployed()
    assert world.start("a", "4").ending() is None


def test_a_start_waits_only_while_another_one_that_runs_deletes(world: World) -> None:
    first = world.start("a", "1")
    assert first.end(Phase.DELETING)
    second = world.start("a", "2")
    assert second.ending() is Phase.DELETING
    world.killed.add("1")
    assert second.ending() is Phase.DRAINING


def served(**options: object) -> ServedConfig:
    return ServedConfig(engine=engine_config(model="demo"), server=ServerConfig(**options))


class FakeServe:
    """Ray Serve with an application of another start, whose update fails."""

    def __init__(self, *names: str) -> None:
        self.names, self.deleted = names, []
        self.statuses = ["RUNNING", "DEPLOYING", "DEPLOY_FAILED"]
        if not names:
            del self.statuses[0]

    def start(self, **_: object) -> None:
        """It runs already."""

    def RunTarget(self, *_: object, **__: object) -> None:
        """Nothing is looked at."""

    def run_many(self, *_: object, **__: object) -> None:
        self.names = ("sensorium",)

    def status(self) -> SimpleNamespace:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        found = SimpleNamespace(status=status, message="no memory", deployments={})
        return SimpleNamespace(applications=dict.fromkeys(self.names, found))

    def delete(self, name: str, *, _blocking: bool) -> None:
        self.deleted.append(name)


@pytest.mark.parametrize(("there", "deleted"), [(("sensorium",), []), ((), ["sensorium"])])
def test_a_start_that_fails_ends_no_application_of_another_one(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    world: World,
    there: tuple[str, ...],
    deleted: list[str],
) -> None:
    fake = FakeServe(*there)
    monkeypatch.setattr(launch, "serve", fake)
    monkeypatch.setattr(launch, "show_logs", lambda: None)
    monkeypatch.setattr(launch, "application", lambda *_, **__: None)
    monkeypatch.setattr(launch.ReplicasRun, "find_address", lambda _: None)
    resources = contextlib.nullcontext(Resources(engine_cpus=1, per_node=2))
    monkeypatch.setattr(launch, "connected", lambda _: resources)
    with pytest.raises(ConfigError, match="no memory"):
        launch.ReplicasRun(served(ray_address="auto"), 8000).run()
    assert fake.deleted == deleted
    assert ("no command is left that would end it: start one" in caplog.text) == bool(there)
    assert not world.values


def test_a_start_waits_until_another_one_has_deleted_the_application(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    fake = FakeServe("sensorium")
    fake.statuses = ["RUNNING", "DELETING", "gone"]
    monkeypatch.setattr(launch, "serve", fake)
    assert world.start("sensorium", "1").end(Phase.DELETING)
    run = launch.ReplicasRun(served(ray_address="auto"), 8000)

    class Waits(threading.Event):
        """First the other program ends; then its application is gone."""

        def wait(self, _: float | None = None) -> bool:
            if world.killed:
                fake.names = ()
            else:
                fake.status()
            world.killed.add("1")
            return False

    run.stop = Waits()
    assert run.found_there([]) is None
    assert fake.names == ()


def test_a_second_signal_ends_the_wait_for_the_cluster(world: World) -> None:
    run = launch.ReplicasRun(served(ray_address="auto"), 8000)
    begun, never = threading.Event(), threading.Event()

    def waits() -> None:
        begun.set()
        never.wait()

    waiting = threading.Thread(target=run.until_hurry, args=(waits, math.inf), daemon=True)
    waiting.start()
    assert begun.wait(60)
    run.hurry.set()
    waiting.join(60)
    assert not waiting.is_alive()
    never.set()
