"""The metrics: names as in vLLM's dashboards, values as they were reported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sensorium.engine.stats import EncodersApart, EncoderStats, EngineStats
from sensorium.errors import ConfigError
from sensorium.metrics.families import (
    COMMON_LABELS,
    MOST_ADAPTERS,
    OTHER_ADAPTERS,
    PROCESS_KINDS,
)
from sensorium.metrics.prometheus import ServingMetrics
from sensorium.metrics.report import RequestReport

MEDIA_WORKER = "sensorium.engine.prompts.media_worker"
STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_deferred=1,
    block_size=32,
    cache_dtype="bfloat16",
    iteration_counts=[3, 0, 2, *[0] * 10, 1],
    iteration_tokens=20_027,
    kv_blocks_total=200,
    kv_blocks_used=50,
    prefix_queries=1000,
    prefix_hits=400,
    encoder_queries=9,
    encoder_hits=4,
    encoder_items=5,
    encoder_resident_embeds=77,
    encoder_num_bytes=1540,
    encoder_capacity_bytes=8000,
    encoder_evictions=6,
    encode_items=4,
    encode_seconds=0.75,
    encode_num_bytes=512,
    encode_failures=1,
    num_preemptions=1,
    num_engine_restarts=2,
    prompt_tokens=1200,
    generation_tokens=300,
    num_embeddings=17,
    num_unusable=3,
    num_steps=310,
    held_features=8,
    item_tokens={"image": 500, "audio": 100},
    media={
        "fetch_count": 6.0,
        "decode_seconds": 1.5,
        "preprocess_num_bytes": 4096.0,
        "processor_cache_queries": 8.0,
        "processor_cache_hits": 2.0,
        "processor_cache_evictions": 3.0,
        "processor_cache_num_entries": 5.0,
        "processor_cache_num_bytes": 12345.0,
        "processor_cache_capacity_bytes": 20000.0,
        "num_loading": 9.0,
        "num_waiting": 4.0,
        "num_busy": 1.0,
        "num_worker_restarts": 7.0,
        "failures": 11.0,
        "failure_media_refused": 10.0,
        "failure_overloaded": 1.0,
    },
)


def report(**fields: object) -> RequestReport:
    """A request that ended well, with two samples."""
    values = {
        "finish_reason": "stop",
        "num_prompt_tokens": 100,
        "num_cached_tokens": 64,
        "num_generation_tokens": 20,
        "longest_sample": 11,
        "num_samples": 2,
        "max_tokens": 32,
        "e2e_seconds": 1.5,
        "prefill_seconds": 0.25,
        "decode_seconds": 1.0,
    }
    return RequestReport(**{**values, **fields})  # type: ignore[arg-type]


def samples(metrics: ServingMetrics) -> dict[tuple[str, str], float]:
    """Values by name and by what tells them apart besides the model."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            model = "" if "process_resident" in sample.name else "m"  # of the whole server
            assert (sample.labels["model_name"], sample.labels["engine"]) == (model, "0")
            others = [v for k, v in sample.labels.items() if k not in COMMON_LABELS]
            found[sample.name, ",".join(others)] = sample.value
    return found


def test_the_engines_numbers() -> None:
    metrics = ServingMetrics("vllm:", model_name="m")
    metrics.update(STATS)
    found = samples(metrics)
    expected = {
        "engine_up": 1,
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "prompt_tokens_cached_total": 400,
        "prefix_cache_queries_total": 1000,
        "prefix_cache_hits_total": 400,
        "mm_encoder_cache_queries_total": 9,
        "mm_encoder_cache_hits_total": 4,
        "mm_encoder_cache_evictions_total": 6,
        "mm_encoder_cache_resident_embeds": 77,
        "mm_encoder_cache_bytes": 1540,
        "mm_encoder_cache_capacity_bytes": 8000,
        "mm_encoder_items_total": 5,
        "mm_encoder_failures_total": 1,
        "mm_held_requests": 8,
        "num_preemptions_total": 1,
        "engine_restarts_total": 2,
        "prompt_tokens_total": 1200,
        "generation_tokens_total": 300,
        "vectors_total": 17,
        "engine_steps_total": 310,
        "mm_cache_queries_total": 8,
        "mm_cache_hits_total": 2,
        "mm_cache_evictions_total": 3,
        "mm_cache_entries": 5,
        "mm_cache_bytes": 12345,
        "mm_cache_capacity_bytes": 20000,
        "media_loading": 9,
        "media_waiting": 4,
        "media_workers_busy": 1,
        "media_worker_restarts_total": 7,
    }
    assert {name: found[f"vllm:{name}", ""] for name in expected} == expected


def test_no_counter_falls_when_a_request_starts() -> None:
    """Prometheus takes a counter that falls for one that began anew, and adds all of it to a rate."""
    metrics = ServingMetrics("vllm:", model_name="m")
    seen = []
    for num_queries, num_hits in ((0, 0), (100, 64)):  # waiting, and running with most of it cached
        metrics.update(
            EngineStats(prompt_tokens=100, prefix_queries=num_queries, prefix_hits=num_hits)
        )
        seen.append({k: v for k, v in samples(metrics).items() if k[0].endswith("_total")})
    assert all(seen[1][name] >= value for name, value in seen[0].items())
    assert seen[1]["vllm:prompt_tokens_by_source_total", "local_compute"] == 36


def test_families_of_newer_dashboards() -> None:
    metrics = ServingMetrics("vllm:", model_name="m")
    metrics.update(STATS)
    metrics.finished(report())
    found = samples(metrics)
    assert found["vllm:num_requests_waiting_by_reason", "capacity"] == 1
    assert found["vllm:num_requests_waiting_by_reason", "deferred"] == 1
    assert found["vllm:prompt_tokens_by_source_total", "local_compute"] == 600
    assert found["vllm:prompt_tokens_by_source_total", "local_cache_hit"] == 400
    assert found["vllm:iteration_tokens_total_sum", ""] == 20_027
    assert found["vllm:iteration_tokens_total_count", ""] == 6
    buckets = [
        found["vllm:iteration_tokens_total_bucket", le] for le in ("1.0", "16.0", "16384.0", "+Inf")
    ]
    assert buckets == [3, 5, 5, 6]
    assert found["vllm:cache_config_info", "32,bfloat16,True,200"] == 1
    assert found["vllm:request_prefill_kv_computed_tokens_sum", ""] == 36


def test_the_state_of_an_engine_as_newer_dashboards_want_it() -> None:
    """Awake, or without a series: these dashboards then say Down, and not Sleeping."""
    metrics = ServingMetrics("vllm:", model_name="m")
    for up in (True, False):
        metrics.update(STATS, up=up)
        found = {k: v for k, v in samples(metrics).items() if k[0] == "vllm:engine_sleep_state"}
        awake = {label: value for (_, label), value in found.items()}
        assert awake == ({"awake": 1, "weights_offloaded": 0, "discard_all": 0} if up else {})


def test_memory_of_the_processes() -> None:
    command = [
        sys.executable,
        "-c",
        "kept = b'x' * (64 << 20); print(len(kept), flush=True); input()",
        MEDIA_WORKER,
    ]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == f"{64 << 20}\n"
        found = samples(ServingMetrics(model_name="m"))
    finally:
        child.communicate("\n")
    name = "sensorium:process_resident_memory_bytes"
    kinds = {label: value for (series, label), value in found.items() if series == name}
    assert set(kinds) == set(PROCESS_KINDS)
    assert kinds["server"] > 10 << 20
    assert kinds["media"] > 64 << 20


def test_a_new_servers_iterations_are_none() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.update(EngineStats())
    assert samples(metrics)["sensorium:iteration_tokens_total_count", ""] == 0


def test_times_of_creation_are_left_out() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.update(STATS)
    metrics.finished(report())
    metrics.http_request("/", "GET", 200, 0.1)
    assert not [name for name, _ in samples(metrics) if name.endswith("_created")]


def num_series(metrics: ServingMetrics) -> int:
    return sum(not line.startswith("#") for line in metrics.render().decode().splitlines())


def test_series_are_few() -> None:
    """Each is stored for every server and scrape; a route costs ten at most."""
    metrics = ServingMetrics(model_name="m")
    metrics.update(STATS)
    before = num_series(metrics)
    assert before <= 330
    for route in ("/a", "/b"):
        metrics.http_request(route, "GET", 200, 0.1)
    assert num_series(metrics) - before <= 2 * 10


def test_the_stages_of_media() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.update(STATS)
    found = samples(metrics)

    def stage(unit: str, name: str) -> float:
        return found[f"sensorium:media_stage_{unit}_total", name]

    assert (stage("items", "fetch"), stage("seconds", "decode")) == (6, 1.5)
    assert (stage("bytes", "preprocess"), stage("seconds", "fetch")) == (4096, 0)
    encode = [stage(unit, "encode") for unit in ("items", "seconds", "bytes")]
    assert encode == [4, 0.75, 512], "the engine's own, beside the pipeline's"


def test_failures_by_code_and_tokens_by_modality() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.update(STATS)
    found = samples(metrics)
    failures = {k[1]: v for k, v in found.items() if k[0] == "sensorium:media_failures_total"}
    assert failures.pop("media_refused") == 10
    assert failures.pop("overloaded") == 1, "a code that is not there from the start"
    assert {"media_undecodable", "media_fetch_timeout", "media_not_cached"} <= set(failures)
    assert not any(failures.values())
    tokens = {
        k[1]: v for k, v in found.items() if k[0] == "sensorium:prompt_tokens_by_modality_total"
    }
    assert tokens == {"text": 600, "image": 500, "video": 0, "audio": 100}


def test_newer_numbers_replace_older_ones() -> None:
    metrics = ServingMetrics(model_name="m")
    assert ("sensorium:engine_up", "") not in samples(metrics), "nothing is known yet"
    metrics.update(STATS)
    metrics.update(EngineStats(num_running=1), up=False)
    found = samples(metrics)
    assert found["sensorium:num_requests_running", ""] == 1
    assert found["sensorium:engine_up", ""] == 0


def test_what_requests_report() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.first_token(0.3)
    metrics.inter_token(0.02)
    metrics.inter_token(0.03)
    metrics.queue(0.001)
    metrics.loop_lag(0.002)
    metrics.finished(report())
    left = {"prefill_seconds": None, "decode_seconds": None, "longest_sample": 0}
    metrics.finished(report(finish_reason="abort", num_generation_tokens=0, **left))
    vector = {"decode_seconds": None, "max_tokens": 0, "longest_sample": 0, "num_samples": 1}
    metrics.finished(report(num_generation_tokens=0, **vector))
    found = {name.removeprefix("sensorium:"): v for (name, _), v in samples(metrics).items()}
    expected = {
        "time_to_first_token_seconds_sum": 0.3,
        "inter_token_latency_seconds_count": 2,
        "request_queue_time_seconds_count": 1,
        "event_loop_lag_seconds_count": 1,
        "e2e_request_latency_seconds_sum": 4.5,
        "request_prefill_time_seconds_sum": 0.5,
        "request_prefill_time_seconds_count": 2,
        "request_decode_time_seconds_sum": 1.0,
        "request_decode_time_seconds_count": 1,
        "request_inference_time_seconds_sum": 1.5,
        "request_inference_time_seconds_count": 2,
        "request_time_per_output_token_seconds_sum": 0.1,
        "request_time_per_output_token_seconds_count": 1,
        "request_prompt_tokens_sum": 300,
        "request_cached_tokens_sum": 192,
        "request_generation_tokens_sum": 20,
        "request_max_num_generation_tokens_sum": 11,
        "request_params_n_sum": 5,
        "request_params_max_tokens_count": 2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    reasons = {
        r: samples(metrics)["sensorium:request_success_total", r]
        for r in ("stop", "abort", "error")
    }
    assert reasons == {"stop": 2, "abort": 1, "error": 0}


def test_a_value_falls_into_its_bucket() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.first_token(0.3)
    found = samples(metrics)
    assert found["sensorium:time_to_first_token_seconds_bucket", "0.5"] == 1
    assert found["sensorium:time_to_first_token_seconds_bucket", "0.25"] == 0


def test_one_token_has_no_time_between_tokens() -> None:
    assert report(longest_sample=1, decode_seconds=0.0).seconds_per_token is None
    assert report(longest_sample=3, decode_seconds=0.5).seconds_per_token == 0.25


def test_http_requests_have_the_names_that_others_give_them() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.http_request("/v1/chat/completions", "POST", 200, 0.5)
    metrics.http_request("/v1/chat/completions", "POST", 503, 0.25)
    for method in ("BREW", "X" * 1000):
        metrics.http_request(None, method, 404, 0.1)
    found = samples(metrics)
    counts = {labels: v for (name, labels), v in found.items() if name == "http_requests_total"}
    assert counts == {
        "200,/v1/chat/completions,POST,2xx": 1,
        "503,/v1/chat/completions,POST,5xx": 1,
        "404,none,other,4xx": 2,
    }
    labels = "/v1/chat/completions,POST"
    assert found["http_request_duration_seconds_sum", labels] == 0.75


def test_an_engine_without_blocks_uses_nothing() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.update(EngineStats())
    assert samples(metrics)["sensorium:kv_cache_usage_perc", ""] == 0


def test_two_servers_do_not_meet() -> None:
    one, two = ServingMetrics(model_name="m"), ServingMetrics(model_name="m")
    one.finished(report())
    assert samples(two)["sensorium:request_success_total", "stop"] == 0


@pytest.mark.parametrize("prefix", ["a b", "9a", "é:", 'a"', "a\n"])
def test_prefixes_that_prometheus_refuses(prefix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServingMetrics(prefix)
    assert caught.value.param == "metrics_prefix"


def test_adapters() -> None:
    """As vLLM has them, which gateways read to send a request where its adapter is."""
    metrics = ServingMetrics("vllm:", model_name="m")
    metrics.update(EngineStats())
    metrics.finished(report())
    assert not [name for name, _ in samples(metrics) if "lora" in name]
    metrics.update(
        EngineStats(
            max_loras=4,
            lora_num_bytes=100,
            lora_capacity_bytes=200,
            running_adapters=["a", "b"],
            waiting_adapters=["b"],
        )
    )
    for name in ("a", "a", "b"):
        metrics.finished(report(adapter=name, finish_reason="error"))
    found = samples(metrics)
    [info] = [key for key in found if key[0] == "vllm:lora_requests_info"]
    assert info[1] == "4,a,b,b", "most, running, waiting"
    assert found["vllm:lora_bytes", ""] == 100
    assert found["vllm:lora_capacity_bytes", ""] == 200
    assert found["vllm:lora_requests_total", "a"] == 2
    assert found["vllm:lora_requests_total", "b"] == 1


def test_names_of_adapters_make_a_bounded_number_of_series() -> None:
    metrics = ServingMetrics(model_name="m")
    for number in range(MOST_ADAPTERS + 10):
        metrics.finished(report(adapter=f"a{number}"))
    metrics.finished(report(adapter="a0"))
    found = {
        name: value
        for (series, name), value in samples(metrics).items()
        if series.endswith("lora_requests_total")
    }
    assert len(found) == MOST_ADAPTERS + 1
    assert found["a0"] == 2
    assert found[OTHER_ADAPTERS] == 10


def test_replicas_of_encoders_have_their_names_and_go_with_them() -> None:
    metrics = ServingMetrics("p:", model_name="m")
    replicas = {"a": EncoderStats(num_items=3), "b": EncoderStats(num_waiting=2)}
    metrics.update_encoders(EncodersApart(replicas, {"failed": 4}, 5))
    text = metrics.render().decode()
    assert 'p:encoder_replica_items_total{engine="a",model_name="m"} 3.0' in text
    assert 'p:encoder_replica_waiting{engine="b",model_name="m"} 2.0' in text
    fallbacks = 'p:encoder_fallback_items_total{engine="0",model_name="m",reason="failed"} 4.0'
    assert fallbacks in text
    assert 'p:encoder_refused_items_total{engine="0",model_name="m"} 5.0' in text
    metrics.update_encoders(EncodersApart({}, {"failed": 4}))
    text = metrics.render().decode()
    assert 'engine="a"' not in text
    assert fallbacks in text
    metrics.update_encoders(None)
    assert "encoder_replica" not in metrics.render().decode()
