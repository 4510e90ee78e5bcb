"""Parts of replicas that need no cluster: options, sums, loads, clocks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sensorium.cli.main import main
from sensorium.config import ServedConfig, ServerConfig, engine_config
from sensorium.engine.stats import AdapterFacts, EngineFacts, EngineStats
from sensorium.errors import ConfigError
from sensorium.ray.serving import launch
from sensorium.ray.serving.app import application, build_app, check
from sensorium.ray.serving.engines import summed
from sensorium.ray.serving.fleet import Fleet, ReplicaReport, common_facts
from sensorium.ray.serving.messages import Clock
from sensorium.ray.serving.scaling import LOAD, load_of, scale, wanted_replicas

FACTS = EngineFacts(2048, 100, 32, 512, "cpu", "float32", 1, 0.5)


def served(**options: object) -> ServedConfig:
    return ServedConfig(engine=engine_config(model="demo"), server=ServerConfig(**options))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"uds": "/tmp/a"}, "socket file"), ({"on_demand": True}, "--on-demand")],
)
def test_what_replicas_cannot_have_is_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        check(served(**options))


@pytest.mark.parametrize("text", ["3", "4:2", "0:2", "a:b", "1:2:3", "1:99999"])
def test_a_range_of_replicas_makes_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="autoscale"):
        ServerConfig(autoscale=text)


def test_several_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "demo", "demo-audio", "--data-parallel-size", "2"]) == 2
    assert "Replicas serve one model" in capsys.readouterr().err


def test_a_configuration_file_of_ray_serve_has_our_options() -> None:
    app = build_app({"model": "demo", "autoscale": "1:3", "served_model_name": ["a"], "port": 9})
    assert app is not None
    with pytest.raises(ConfigError, match="max_model_length"):
        build_app({"model": "demo", "max_model_length": 3})


def test_stores_are_off_where_several_processes_would_have_one_each() -> None:
    assert application(served(api_server_count=2), _resources()) is not None


def _resources() -> object:
    from sensorium.ray.serving.app import Resources

    return Resources(engine_cpus=1, per_node=2)


def test_statistics_are_summed() -> None:
    one = EngineStats(num_running=2, block_size=32, cache_dtype="int8", item_tokens={"image": 3})
    two = EngineStats(num_running=3, block_size=32, iteration_counts=[1, 2], running_adapters=["a"])
    total = summed([one, two])
    assert (total.num_running, total.block_size, total.cache_dtype) == (5, 32, "int8")
    assert (total.item_tokens, total.iteration_counts) == ({"image": 3}, [1, 2])
    assert total.running_adapters == ["a"]
    assert one.num_running == 2, "what is summed stays"
    assert summed([]) == EngineStats()


def test_facts_hold_for_each_replica() -> None:
    adapters = [AdapterFacts(name, "p", name.encode(), 8) for name in "ab"]
    first = EngineFacts(4096, 9, 32, 512, "cpu", "float32", 1, 1.0, adapters=tuple(adapters))
    second = EngineFacts(1024, 9, 32, 512, "cpu", "float32", 1, 1.0, adapters=tuple(adapters[:1]))
    common = common_facts([first, second])
    assert common.max_model_len == 1024
    assert [adapter.name for adapter in common.adapters] == ["a"]


def test_a_fleet_is_up_while_some_replica_may_be() -> None:
    down = ReplicaReport(False, FACTS, EngineStats())
    assert not Fleet({}).is_up
    assert not Fleet({"a": down}).is_up
    assert Fleet({"a": down, "b": None}).is_up


def test_the_number_of_replicas_follows_their_loads() -> None:
    assert load_of(32, 64, 0.2) == 0.5
    assert load_of(8, 64, 0.8) == 1.0
    assert wanted_replicas({"a": 0.75}, 1, 8) == 1
    assert wanted_replicas({"a": 2.0, "b": 2.0}, 1, 8) == 6
    assert wanted_replicas({"a": 9.0}, 1, 8) == 8
    assert wanted_replicas({"a": 0.0}, 2, 8) == 2

    context = SimpleNamespace(
        aggregated_metrics={LOAD: {"a": 1.5}},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        target_num_replicas=1,
    )
    assert scale(context) == (2, {})
    context.aggregated_metrics = {}
    assert scale(context) == (1, {})


def test_times_of_another_machine_are_moved() -> None:
    assert Clock.now().offset() == 0.0
    elsewhere = Clock("another boot", Clock.now().seconds - 500.0)
    assert elsewhere.offset() == pytest.approx(500.0, abs=5.0)


def test_a_single_server_does_not_import_ray() -> None:
    code = "import sys, sensorium.server.launch; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class FakeServe:
    """Ray Serve with an application of another start, whose update fails."""

    def __init__(self, *names: str) -> None:
        self.names, self.deleted = names, []
        self.statuses = ["DEPLOYING", "DEPLOY_FAILED"]

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
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], deleted: list[str]
) -> None:
    fake = FakeServe(*there)
    monkeypatch.setattr(launch, "serve", fake)
    monkeypatch.setattr(launch, "show_logs", lambda: None)
    monkeypatch.setattr(launch, "application", lambda *_: None)
    monkeypatch.setattr(launch.ReplicasRun, "find_address", lambda _: None)
    monkeypatch.setattr(launch, "connected", lambda _: contextlib.nullcontext(_resources()))
    with pytest.raises(ConfigError, match="no memory"):
        launch.ReplicasRun(served(ray_address="auto"), 8000).run()
    assert fake.deleted == deleted
