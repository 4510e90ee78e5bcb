"""The Grafana dashboard among the examples: importable, and about metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sensorium.metrics.families import COMMON_LABELS
from sensorium.metrics.reference import FAMILIES

FILE = Path(__file__).parents[2] / "examples" / "grafana" / "sensorium.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
TARGETS = [(panel, target) for panel in PANELS for target in panel.get("targets", ())]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

BUILT_IN = {"__rate_interval"}
WORDS = {
    *("sum", "min", "max", "rate", "increase", "histogram_quantile", "by", "label_values"),
    *("le", "model_name", "model", "datasource", "prefix"),
}


def names_in(expression: str) -> set[str]:
    """Names of series in an expression, with ``${prefix}`` where they have it."""
    bare = re.sub(r"\{[^}]*=~[^}]*\}|\[[^]]*\]|by \([^)]*\)", " ", expression)
    words = re.findall(r"(?:\$\{prefix\})?[a-z_][a-z0-9_]*", bare)
    return {word for word in words if word not in WORDS}


KNOWN = {
    ("${prefix}" if family.prefixed else "") + series
    for family in FAMILIES
    for series in family.series
}
LABELS = {
    series: {*COMMON_LABELS, *family.labels} | ({"le"} if family.kind == "histogram" else set())
    for family in FAMILIES
    for series in family.series
}


@pytest.mark.parametrize(
    "expression", [target["expr"] for _, target in TARGETS] + [VARIABLES["model"]["definition"]]
)
def test_each_expression_names_metrics_that_there_are(expression: str) -> None:
    names = names_in(expression)
    assert names
    assert names <= KNOWN
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        wanted = set(re.findall(r"\w+", grouped))
        assert all(wanted <= LABELS[name.removeprefix("${prefix}")] for name in names)
    used = set(re.findall(r"\$\{?(\w+)", expression))
    assert used <= set(VARIABLES) | BUILT_IN


def test_a_name_that_is_not_there_would_be_seen() -> None:
    assert names_in('sum(rate(${prefix}nope_total{model_name=~"$model"}[1m]))') == {
        "${prefix}nope_total"
    }
    assert not names_in('sum(rate(${prefix}nope_total{model_name=~"$model"}[1m]))') <= KNOWN


@pytest.mark.parametrize(("panel", "target"), TARGETS)
def test_a_legend_names_labels_of_its_query(panel: dict[str, Any], target: dict[str, Any]) -> None:
    grouped = set(re.findall(r"\w+", ",".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= grouped


def test_grafana_can_import_it() -> None:
    assert DASHBOARD["id"] is None, "an id belongs to one installation"
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"]
    assert {"from", "to"} <= set(DASHBOARD["time"])
    assert [v["type"] for v in VARIABLES.values()] == ["datasource", "textbox", "query"]
    assert VARIABLES["prefix"]["current"]["value"] == "sensorium:"
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["type"] in {"row", "stat", "timeseries"}
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        ids = [target["refId"] for target in panel["targets"]]
        assert ids
        assert len(set(ids)) == len(ids)


def test_panels_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_metrics_of_the_specification_are_shown() -> None:
    shown = set().union(*(names_in(target["expr"]) for _, target in TARGETS))
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("prefix_cache_hits_total", "mm_cache_hits_total", "mm_encoder_cache_hits_total"),
        *("mm_cache_bytes", "mm_encoder_cache_bytes", "prompt_tokens_total"),
        *("generation_tokens_total", "time_to_first_token_seconds_bucket"),
        *("inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_bucket"),
        *("request_queue_time_seconds_sum", "request_prefill_time_seconds_sum"),
        *("request_decode_time_seconds_sum", "media_stage_seconds_total"),
        "media_stage_bytes_total",
    ):
        assert "${prefix}" + name in shown
