"""Parts of replicas that need no cluster: options, sums, loads, clocks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sensorium.cli.main import main
from sensorium.config import ModelConfig, ServedConfig, ServerConfig, engine_config
from sensorium.distributed.routing import RequestKey
from sensorium.engine.stats import AdapterFacts, EngineFacts, EngineStats
from sensorium.errors import ConfigError
from sensorium.ray.serving import launch
from sensorium.ray.serving.app import Resources, application, build_app, check, version_of
from sensorium.ray.serving.cluster import Need, check_own, divided, own_engine_cpus
from sensorium.ray.serving.engine import LOST_SECONDS, Loss
from sensorium.ray.serving.engines import summed
from sensorium.ray.serving.fleet import Fleet, ReplicaReport, common_facts
from sensorium.ray.serving.messages import Clock, Ticket
from sensorium.ray.serving.router import EngineRouter
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


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"encoder_replicas": -1}, "encoder_replicas"),
        ({"encoder_gpus": 0.5}, "--encoder-replicas"),
        ({"encoder_replicas": 1, "encoder_gpus": -1.0}, "encoder_gpus"),
    ],
)
def test_options_of_encoders_make_sense(options: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        ServerConfig(**options)


def test_encoders_are_a_deployment_of_their_own() -> None:
    """They keep no embeddings in the index that engines share."""
    options = {"model": "demo", "encoder_replicas": 2, "encoder_gpus": 0.5, "encoder_cpus": 3}
    apart = build_app({**options, "engine_gpus": 1})
    deployments = {d.name: d for d in deployments_of(apart)}
    assert set(deployments) == {"Server", "Engine", "Encoder"}
    encoder = deployments["Encoder"]
    assert encoder.num_replicas == 2
    assert encoder.ray_actor_options == {"num_cpus": 3, "num_gpus": 0.5}
    with pytest.raises(ConfigError, match="another kind of device"):
        build_app(options)
    with pytest.raises(ConfigError, match="another kind of device"):
        build_app({**options, "encoder_gpus": 0, "engine_gpus": 1})
    together = {d.name for d in deployments_of(build_app({"model": "demo"}))}
    assert together == {"Server", "Engine", "Embeddings"}


def deployments_of(app: Any) -> list[Any]:
    """The deployments of an application, once each."""
    found = {app._bound_deployment.name: app._bound_deployment}
    for value in app._bound_deployment.init_args:
        if hasattr(value, "_bound_deployment"):
            found |= {d.name: d for d in deployments_of(value)}
    return list(found.values())


NO_MEDIA = {"image": 0, "video": 0, "audio": 0}


def test_encoders_need_media() -> None:
    with pytest.raises(ConfigError, match="limit_mm_per_prompt"):
        build_app({"model": "demo", "encoder_replicas": 1, "limit_mm_per_prompt": NO_MEDIA})


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


def _resources() -> Resources:
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


@pytest.mark.parametrize(
    ("nodes", "need", "expected"),
    [
        ([{"CPU": 4}], Need(2, others_cpus=1), (1, 0, 2)),
        ([{"CPU": 0}, {"CPU": 16}, {"CPU": 16}], Need(2, others_cpus=1), (15, 0, 1)),
        ([{}, {"CPU": 9}, {"CPU": 17}], Need(4, others_cpus=1), (4, 0, 2)),
        ([{"CPU": 32, "GPU": 4}] * 2, Need(8, gpus=1, others_cpus=2), (7, 1, 4)),
        ([{"CPU": 32, "GPU": 8}], Need(2, 2, gpus=2, others_cpus=1), (7, 2, 4)),
        ([{"CPU": 64}, {"CPU": 9, "GPU": 1}], Need(1, gpus=1, others_cpus=1), (8, 1, 1)),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 9, "GPU": 1}], Need(2, gpus=1), (8, 1, 1)),
        ([{"CPU": 5, "GPU": 8}], Need(1, ranks=8, gpus=8, others_cpus=1), (4, 8, 1)),
        ([{"CPU": 13}], Need(2, others_cpus=1, encoders=1), (4, 0, 3)),
        ([{"CPU": 25, "GPU": 2}], Need(1, gpus=1, encoders=1, encoder_gpus=0.5), (8, 1, 3)),
    ],
)
def test_a_cluster_is_divided_among_the_machines_that_can_hold_an_engine(
    nodes: list[dict[str, float]], need: Need, expected: tuple[int, int, int]
) -> None:
    found = divided(nodes, need)
    assert (found.engine_cpus, found.engine_gpus, found.per_node) == expected


@pytest.mark.parametrize(
    ("nodes", "need", "words"),
    [
        ([{"CPU": 4}] * 4, Need(1, ranks=8), "8 CPUs on one machine; .* at most 4 CPUs"),
        ([{"CPU": 8, "GPU": 1}] * 4, Need(1, 2, gpus=2), "2 GPUs on one machine; .* and 1 GPUs"),
        ([{"CPU": 8, "GPU": 3}] * 2, Need(3, 2, gpus=2), "GPUs for 2 replicas"),
        ([{"CPU": 2}], Need(2, others_cpus=1), "2 CPUs.* need 3"),
        ([{"CPU": 1, "GPU": 4}], Need(2, gpus=1), "1 CPUs.* need 2"),
        ([], Need(1), "at most 0 CPUs"),
        ([{"CPU": 8, "GPU": 2}], Need(2, gpus=1, encoders=1, encoder_gpus=1), "2 GPUs.* the 3"),
        ([{"CPU": 3}], Need(2, others_cpus=1, encoders=1), "and 1 of encoders .* need 4"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(
    nodes: list[dict[str, float]], need: Need, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        divided(nodes, need)


def test_ranks_fit_the_processors_of_this_machine(caplog: pytest.LogCaptureFixture) -> None:
    assert own_engine_cpus(8, 2, 2) == 4
    assert not caplog.records
    assert own_engine_cpus(2, 4, 1) == 1
    assert "4 processes of replicas share 2 processors" in caplog.text
    with pytest.raises(ConfigError, match="4 processors; this machine has 2"):
        check_own(2, 0, Need(1, ranks=4))
    check_own(2, 8, Need(2, ranks=4, gpus=4))
    with pytest.raises(ConfigError, match="8 GPUs; 3 replicas need 12"):
        check_own(64, 8, Need(3, ranks=4, gpus=4))
    with pytest.raises(ConfigError, match=r"2 GPUs; 2 replicas and 1 of encoders need 2\.5"):
        check_own(64, 2, Need(2, gpus=1, encoders=1, encoder_gpus=0.5))


def test_it_is_said_when_a_small_machine_decides_for_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    divided([{"CPU": 16}, {"CPU": 16}], Need(2))
    assert not caplog.records
    assert divided([{"CPU": 4}, {"CPU": 16}], Need(2)).engine_cpus == 4
    assert "reserves 4 CPUs" in caplog.text
    assert "largest of 2 machines it would be 16" in caplog.text


def test_what_waits_for_a_place_is_said_once_and_what_is_missing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    waits = "Deployment 'Engine' in application 'a' has 2 replicas that have taken more than 30s "
    message = SimpleNamespace(message=waits + "to be scheduled. This may be")
    for text in ("", waits + "to initialize."):
        quiet = SimpleNamespace(deployments={"Engine": SimpleNamespace(message=text)})
        assert not launch.say_what_is_missing(quiet, _resources())
    found = SimpleNamespace(deployments={"Engine": message})
    assert launch.say_what_is_missing(found, _resources())
    assert "2 replicas of Engine wait" in caplog.text
    assert "1 CPUs on one machine (1 are free" in caplog.text
    message.message = message.message.replace("Engine", "Encoder")
    found.deployments = {"Encoder": message}
    own = Resources(encoder_cpus=3, engine_gpus=2, encoder_gpus=0.5)
    assert launch.say_what_is_missing(found, own)
    assert "3 CPUs on one machine (1 are free on all together) and 0.5 GPUs" in caplog.text


def test_an_engine_that_loads_is_not_lost() -> None:
    loss = Loss()
    assert not loss.is_final(False, True, 0.0)
    assert not loss.is_final(False, True, 10 * LOST_SECONDS), "it loads"
    assert loss.is_final(False, False, 10 * LOST_SECONDS + 1), "the attempt failed"
    assert loss.is_final(False, True, 10 * LOST_SECONDS + 2), "said is said"
    assert not loss.is_final(True, False, 10 * LOST_SECONDS + 3)
    assert not loss.is_final(False, False, 10 * LOST_SECONDS + 4), "time counts anew"


def test_the_same_options_have_one_version(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"a")

    def version(fresh: str = "", **options: object) -> str:
        engine = dataclasses.replace(served().engine, model=ModelConfig(model=str(tmp_path)))
        return version_of(fresh, ServedConfig(engine=engine, server=ServerConfig(**options)), 2)

    first = version(api_key=("a",))
    assert version(api_key=("a",)) == first
    assert version(api_key=("b",)) != first
    assert version("fresh", api_key=("a",)) != first
    weights.write_bytes(b"ab")
    assert version(api_key=("a",)) != first
    second = version(api_key=("a",))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "file").write_bytes(b"a")
    assert version(api_key=("a",)) != second


@pytest.mark.parametrize("name", ["chat_template", "lora_modules"])
def test_files_beside_the_model_are_part_of_the_version(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"a")
    options: dict[str, Any] = {"chat_template": str(tmp_path / "file")}
    if name == "lora_modules":
        options = {"enable_lora": True, "lora_modules": (f"a={tmp_path}",)}
    config = engine_config(model="demo", **options)
    first = version_of("", config)
    assert version_of("", config) == first
    (tmp_path / "file").write_bytes(b"ab")
    assert version_of("", config) != first


def test_a_model_of_the_hub_is_the_same_only_where_its_revision_is_a_commit() -> None:
    moving, fixed = (engine_config(model="a/b", revision=r) for r in (None, "0123456789" * 4))
    assert version_of("", moving) != version_of("", moving)
    assert version_of("", fixed) == version_of("", fixed)


class FakeRouting(EngineRouter):
    """The router without Ray Serve around it."""

    _event_loop = SimpleNamespace(call_soon_threadsafe=lambda call, *a: call(*a))

    def __init__(self) -> None:
        self.initialize_state()
        self.router.set_replicas(["a", "b"])


class FakeResult:
    """An attempt of Ray Serve, which has ended or will end."""

    def __init__(self, has_ended: bool) -> None:
        self.has_ended, self.calls = has_ended, []

    def add_done_callback(self, call: Any) -> None:
        if self.has_ended:
            call(None)
        else:
            self.calls.append(call)


@pytest.mark.parametrize("ends_first", [False, True])
def test_what_was_sent_ends_once_whenever_ray_serve_says_so(ends_first: bool) -> None:
    routing = FakeRouting()
    key = RequestKey(64, (b"12345678",), ())
    pending = SimpleNamespace(args=[Ticket(key)], metadata=SimpleNamespace(internal_request_id="r"))
    replica = SimpleNamespace(unique_id="a")
    before = routing.router.waits()
    result = FakeResult(ends_first)
    routing.on_request_routed(pending, replica, result)
    # The attempt that was rejected before, of the same id, ends late.
    routing.on_request_completed(replica, "r")
    if not ends_first:
        assert routing.router.waits()["a"] > before["a"]
        for call in result.calls:
            call(None)
    assert routing.router.waits() == before
