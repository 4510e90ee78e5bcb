"""Metrics of several processes for HTTP in one answer."""

from __future__ import annotations

import pickle
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from sensorium.engine.stats import EngineStats
from sensorium.metrics.prometheus import ServingMetrics
from sensorium.metrics.servers import OtherServers


def process(downloads: float) -> ServingMetrics:
    """Metrics of a process in front of two replicas."""
    metrics = ServingMetrics("p:", model_name="m")
    replicas = {name: (EngineStats(prompt_tokens=5, encode_items=2), True) for name in ("x", "y")}
    media = {"downloads_num_requests": downloads, "fetch_count": downloads}
    metrics.update_replicas(replicas, media)
    for _ in range(int(downloads)):
        metrics.http_request("/health", "GET", 200, 0.1)
    return metrics


def test_series_of_processes_name_them_and_engines_come_once() -> None:
    one, other = process(1), process(2)
    families = pickle.loads(pickle.dumps(other.of_process()))
    text = one.render(OtherServers("a", {"b": families}, num_missing=1)).decode()
    for kind in ("HELP", "TYPE"):
        names = [line.split()[2] for line in text.splitlines() if line.startswith(f"# {kind}")]
        assert len(names) == len(set(names))
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    values = {
        (s.name.removeprefix("p:"), s.labels["engine"], s.labels.get("server"), stage): s.value
        for s in samples
        if (stage := s.labels.get("stage")) is None or stage in ("fetch", "encode")
    }
    assert values["media_downloads_total", "0", "a", None] == 1
    assert values["media_downloads_total", "0", "b", None] == 2
    assert values["media_stage_items_total", "0", "b", "fetch"] == 2
    assert values["media_stage_items_total", "x", None, "encode"] == 2
    assert ("media_stage_items_total", "0", "b", "encode") not in values
    assert values["http_requests_total", "0", "b", None] == 2
    assert values["servers_missing", "0", None, None] == 1
    engines = Counter(s.labels["engine"] for s in samples if s.name == "p:engine_up")
    assert engines == {"x": 1, "y": 1}


def test_a_process_alone_has_no_such_label() -> None:
    text = process(1).render().decode()
    assert "server=" not in text
    assert "servers_missing" not in text
    assert len([line for line in text.splitlines() if "media_downloads_total{" in line]) == 1
