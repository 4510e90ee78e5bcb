"""The metrics: names as in vLLM's dashboards, values as they were reported."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sensorium.engine.stats import EngineStats
from sensorium.errors import ConfigError
from sensorium.metrics.prometheus import ServingMetrics

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    kv_blocks_total=200,
    kv_blocks_used=50,
    prefix_queries=1000,
    prefix_hits=400,
    encoder_queries=9,
    encoder_hits=4,
    encoder_items=5,
    encoder_resident_embeds=77,
    num_preemptions=1,
    prompt_tokens=1200,
    generation_tokens=300,
    num_steps=310,
    media={
        "fetch_count": 6.0,
        "decode_seconds": 1.5,
        "preprocess_num_bytes": 4096.0,
        "processor_cache_queries": 8.0,
        "processor_cache_hits": 2.0,
        "processor_cache_num_bytes": 12345.0,
    },
)


def samples(metrics: ServingMetrics) -> dict[tuple[str, str], float]:
    """Values by name and by what tells them apart besides the model."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "m"
            others = [v for k, v in sample.labels.items() if k != "model_name"]
            found[sample.name, ",".join(others)] = sample.value
    return found


def test_the_engines_numbers() -> None:
    metrics = ServingMetrics("vllm:", model_name="m")
    metrics.update(STATS)
    found = samples(metrics)
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries_total": 1000,
        "prefix_cache_hits_total": 400,
        "mm_encoder_cache_queries_total": 9,
        "mm_encoder_cache_hits_total": 4,
        "mm_encoder_items_total": 5,
        "mm_encoder_cache_resident_embeds": 77,
        "num_preemptions_total": 1,
        "prompt_tokens_total": 1200,
        "generation_tokens_total": 300,
        "engine_steps_total": 310,
        "mm_cache_queries_total": 8,
        "mm_cache_hits_total": 2,
        "mm_cache_bytes": 12345,
    }
    assert {name: found[f"vllm:{name}", ""] for name in expected} == expected
    assert found["vllm:media_stage_items_total", "fetch"] == 6
    assert found["vllm:media_stage_seconds_total", "decode"] == 1.5
    assert found["vllm:media_stage_bytes_total", "preprocess"] == 4096
    assert found["vllm:media_stage_seconds_total", "fetch"] == 0


def test_newer_numbers_replace_older_ones() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.update(STATS)
    metrics.update(EngineStats(num_running=1))
    assert samples(metrics)["sensorium:num_requests_running", ""] == 1


def test_what_requests_report() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.first_token(0.3)
    metrics.inter_token(0.02)
    metrics.inter_token(0.03)
    metrics.queue(0.001)
    metrics.finished("stop", 100, 20, 64, 1.5)
    metrics.finished("abort", 10, 0, 0, 0.5)
    found = samples(metrics)
    assert found["sensorium:time_to_first_token_seconds_sum", ""] == 0.3
    assert found["sensorium:time_to_first_token_seconds_bucket", "0.5"] == 1
    assert found["sensorium:time_to_first_token_seconds_bucket", "0.25"] == 0
    assert found["sensorium:inter_token_latency_seconds_count", ""] == 2
    assert found["sensorium:request_queue_time_seconds_count", ""] == 1
    assert found["sensorium:e2e_request_latency_seconds_sum", ""] == 2
    assert found["sensorium:request_success_total", "stop"] == 1
    assert found["sensorium:request_success_total", "abort"] == 1
    assert found["sensorium:request_success_total", "length"] == 0
    assert found["sensorium:request_prompt_tokens_sum", ""] == 110
    assert found["sensorium:request_cached_tokens_sum", ""] == 64


def test_an_engine_without_blocks_uses_nothing() -> None:
    metrics = ServingMetrics(model_name="m")
    metrics.update(EngineStats())
    assert samples(metrics)["sensorium:kv_cache_usage_perc", ""] == 0


def test_two_servers_do_not_meet() -> None:
    one, two = ServingMetrics(model_name="m"), ServingMetrics(model_name="m")
    one.finished("stop", 1, 1, 0, 0.1)
    assert samples(two)["sensorium:request_success_total", "stop"] == 0


@pytest.mark.parametrize("prefix", ["a b", "9a", "é:", 'a"', "a\n"])
def test_prefixes_that_prometheus_refuses(prefix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServingMetrics(prefix)
    assert caught.value.param == "metrics_prefix"
