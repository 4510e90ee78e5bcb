"""Configuration: each value is checked, and nothing is taken for something else."""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.config import (
    ServerConfig,
    engine_config,
    engine_option_names,
    parse_limits,
)
from sensorium.environment import log_level, media_environment
from sensorium.errors import ConfigError

WRONG: list[tuple[str, Any]] = [
    ("model", ""),
    ("model", None),
    ("tokenizer", 5),
    ("dtype", "int8"),
    ("device", 0),
    ("seed", "0"),
    ("max_model_len", 0),
    ("num_threads", True),
    ("quantization", "int3"),
    ("runner", "embedding"),
    ("convert", "classify"),
    ("task", "classify"),
    ("chat_template", ["x"]),
    ("interleave_mm_strings", "no"),
    ("block_size", 0),
    ("enable_prefix_caching", "false"),
    ("gpu_memory_utilization", 1.5),
    ("mm_processor_cache_gb", float("nan")),
    ("max_num_seqs", 0),
    ("enable_chunked_prefill", 1),
    ("limit_mm_per_prompt", {"image": -1}),
    ("limit_mm_per_prompt", {"picture": 1}),
    ("media_io_kwargs", []),
    ("enable_mm_embeds", "yes"),
    ("allowed_media_domains", "example.org"),
    ("allowed_media_domains", ["example.org", 5]),
    ("image_fetch_timeout", 0),
    ("max_media_redirects", -1),
    ("media_fetch_retries", 1.5),
    ("max_media_connections", 0),
    ("max_media_connections_per_host", 0),
    ("max_media_fetches_per_request", 0),
    ("max_media_bytes_in_flight", 0),
    ("media_url_reuse_seconds", -1),
    ("media_url_reuse_bytes", "64"),
    ("media_download_cache", 5),
    ("media_download_cache_gb", 0),
    ("media_download_cache_seconds", 0),
    ("tensor_parallel_size", 0),
    ("log_stats_interval", 0),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[name for name, _ in WRONG])
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_config(**{name: value})
    assert (caught.value.param or "").startswith(name)


def test_unknown_keywords_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        engine_config(max_num_seq=3)
    assert len(set(engine_option_names())) == len(engine_option_names())


def test_three_spellings_of_one_choice() -> None:
    assert engine_config().model.runner == "auto"
    assert engine_config(runner="pooling").model.runner == "pooling"
    assert engine_config(convert="embed").model.runner == "pooling"
    for task, runner in (("generate", "generate"), ("embed", "pooling"), ("embedding", "pooling")):
        with pytest.warns(DeprecationWarning, match="deprecated"):
            assert engine_config(task=task).model.runner == runner
    with pytest.raises(ConfigError, match="does not go with runner='generate'"):
        engine_config(convert="embed", runner="generate")
    with pytest.raises(ConfigError, match="'generate' does not go with runner='pooling'"):
        engine_config(task="generate", runner="pooling")


def test_lists_become_tuples() -> None:
    config = engine_config(allowed_media_domains=["a.org", "b.org"])
    assert config.media.allowed_media_domains == ("a.org", "b.org")
    assert ServerConfig(api_key=["x"]).api_key == ("x",)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="api_key"):
        ServerConfig(api_key="x")  # type: ignore[arg-type]


def test_the_environment_is_read_and_loudly_invalid() -> None:
    found = media_environment(
        {
            "SENSORIUM_IMAGE_FETCH_TIMEOUT": "2",
            "VLLM_IMAGE_FETCH_TIMEOUT": "9",
            "APHRODITE_IMAGE_FETCH_TIMEOUT": "8",
            "APHRODITE_MEDIA_URL_ALLOW_REDIRECTS": "1",
            "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        }
    )
    assert found == {"image_fetch_timeout": 2.0, "media_url_allow_redirects": False}
    for variable in ("SENSORIUM_MEDIA_URL_ALLOW_REDIRECTS", "APHRODITE_AUDIO_FETCH_TIMEOUT"):
        with pytest.raises(ConfigError, match=variable):
            media_environment({variable: "maybe"})
    for text in ("0", "-1", "nan", "inf", "1e9", ""):
        with pytest.raises(ConfigError, match="VLLM_VIDEO_FETCH_TIMEOUT"):
            media_environment({"VLLM_VIDEO_FETCH_TIMEOUT": text})
    names = ("IMAGE_FETCH_TIMEOUT", "VIDEO_FETCH_TIMEOUT", "AUDIO_FETCH_TIMEOUT")
    for name in names:
        for prefix in ("SENSORIUM_", "VLLM_", "APHRODITE_"):
            assert media_environment({prefix + name: "7.5"}) == {name.lower(): 7.5}


def test_limits_in_both_spellings() -> None:
    assert parse_limits("image=2, video=1") == {"image": 2, "video": 1}
    assert parse_limits('{"image": {"count": 3}}') == {"image": {"count": 3}}
    assert engine_config(limit_mm_per_prompt={"image": {"count": 3}}).media.limit("image") == 3
    for text in ("image", "image=x", "{", "{'image': 1}"):
        with pytest.raises(ConfigError):
            parse_limits(text)


def test_log_level_of_the_environment() -> None:
    assert log_level({}) == "INFO"
    assert log_level({"SENSORIUM_LOG_LEVEL": "debug"}) == "DEBUG"
    assert log_level({"SENSORIUM_LOG_LEVEL": "loudest"}) == "INFO"
