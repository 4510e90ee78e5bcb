"""The page of all metrics, made of the same families as ``/metrics``."""

from __future__ import annotations

from collections.abc import Sequence

from sensorium.metrics.families import SECTIONS, MetricFamily

_INTRODUCTION = """# Metrics

`GET /metrics` answers in Prometheus' text format. This page is made from `sensorium.metrics.families` by
`scripts/metrics_docs`; edit the families, not the page.

Names begin with `sensorium:`, or with what `--metrics-prefix` says: most are those that vLLM has, so with
`--metrics-prefix vllm:` its dashboards work. Those that begin with `http_` have no prefix: they are what servers of
this framework commonly call them. Counters are scraped with `_total`, histograms as `_bucket`, `_sum` and `_count`.
Every series has the labels `model_name` and `engine` (the number of the engine, which is 0, as in vLLM); further ones
are listed. Routes are templates such as `/v1/models/{name:path}`, never paths; what is refused before it has a route is
under `none`. `status` is `2xx`, `4xx` and so on, `code` the status itself. A request that is refused before it reaches
the engine is counted there only. Series of creation times (`_created`) are left out.

Numbers of the engine count from its start, so they begin at 0 after a restart, as Prometheus expects of counters; those
of requests, media and HTTP go on. While there is no engine, its counters stay as they were last, and `engine_up` is 0.

`examples/grafana/sensorium.json` is a dashboard of them: import it in Grafana and choose the data source; its variable
`prefix` is for servers with another one.
"""


def metrics_markdown() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *(_section(*section) for section in SECTIONS.items())])


def _section(title: str, families: Sequence[MetricFamily]) -> str:
    rows = [
        f"## {title}",
        "",
        "| metric | kind | labels | meaning |",
        "| --- | --- | --- | --- |",
        *map(_row, families),
        "",
    ]
    return "\n".join(rows)


def _row(family: MetricFamily) -> str:
    name = f"{family.name}_total" if family.kind == "counter" else family.name
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{name}` | {family.kind} | {labels} | {family.help} |"
