"""What is documented, what /metrics renders and what it is read from are the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sensorium.engine.stats import EncodersApart, EncoderStats, EngineStats
from sensorium.metrics.encoder_families import ENCODER_ROWS
from sensorium.metrics.families import (
    COMMON_LABELS,
    ENGINE_ROWS,
    LORA_ROWS,
    MEDIA_ROWS,
    SERVER,
    STAGE_UNITS,
    MetricFamily,
)
from sensorium.metrics.prometheus import ServingMetrics
from sensorium.metrics.reference import FAMILIES, metrics_markdown
from sensorium.metrics.report import RequestReport
from sensorium.metrics.servers import OtherServers
from sensorium.metrics.statistics import Statistics
from sensorium.multimodal.cache.features import CacheStats
from sensorium.multimodal.fetch.fetcher import DownloadStats
from sensorium.multimodal.stats import StageCounters
from sensorium.multimodal.workers.pool import DecoderStats

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def rendered() -> dict[str, tuple[str, frozenset[str]]]:
    """Kind and labels of each family that is scraped, by name, without the series of creation
    times.
    """
    metrics = ServingMetrics("p:", model_name="m")
    metrics.update(EngineStats(max_loras=1))
    metrics.update_encoders(EncodersApart({"1": EncoderStats()}))
    metrics.http_request("/", "GET", 200, 0.1)
    metrics.finished(RequestReport(
        finish_reason="stop", num_prompt_tokens=1, num_cached_tokens=0, num_generation_tokens=1,
        longest_sample=1, num_samples=1, max_tokens=1, e2e_seconds=1.0, adapter="a",
    ))  # fmt: skip
    families = {}
    text = metrics.render(OtherServers("b", {}, 0)).decode()
    for family in text_string_to_metric_families(text):
        if not family.name.endswith("_created"):
            labels = {k for s in family.samples for k in s.labels}
            labels = frozenset(labels - {"le", SERVER, *COMMON_LABELS})
            families[family.name.removeprefix("p:")] = (family.type, labels)
    return families


def test_the_page_is_up_to_date() -> None:
    message = "run scripts/metrics_docs"
    assert PAGE.read_text(encoding="utf-8") == metrics_markdown(), message


def test_the_page_lists_what_is_rendered_and_nothing_else() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    listed = {
        name.removesuffix("_total") if kind == "counter" else name: (
            kind,
            frozenset(re.findall(r"\w+", labels)),
        )
        for name, kind, labels in rows
    }
    assert len(listed) == len(rows) == len(FAMILIES), "no name twice"
    assert listed == rendered()


def test_every_number_is_one_that_the_engine_and_the_pipeline_give() -> None:
    fields = {field.name for field in dataclasses.fields(EngineStats)}
    assert {row.field for row in (*ENGINE_ROWS, *LORA_ROWS)} <= fields
    assert set(Statistics.__annotations__) <= fields
    fields = {field.name for field in dataclasses.fields(EncoderStats)}
    assert {row.field for row in ENCODER_ROWS} == fields
    media = (
        StageCounters()
        .snapshot(CacheStats(0, 0, 0, 0, 0, 0), DecoderStats(), DownloadStats())
        .flat()
    )
    assert {row.field for row in MEDIA_ROWS} <= set(media)
    stages = {
        f"{stage}_{unit}" for stage in ("fetch", "decode", "preprocess") for _, unit in STAGE_UNITS
    }
    assert stages <= set(media)


def test_only_histograms_have_buckets() -> None:
    with pytest.raises(ValueError, match="buckets"):
        MetricFamily("name", "histogram", "help")
    with pytest.raises(ValueError, match="buckets"):
        MetricFamily("name", "gauge", "help", buckets=(1.0,))
