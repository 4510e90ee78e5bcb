"""The documentation page of all metrics, from the same families as ``/metrics``."""

from __future__ import annotations

from collections.abc import Sequence

from sensorium.metrics.encoder_families import ENCODER_FALLBACKS, ENCODER_REFUSED, ENCODER_ROWS
from sensorium.metrics.families import (
    ACCEPTED_AT,
    CACHE_CONFIG,
    ENGINE_ROWS,
    ENGINE_UP,
    EVENT_LOOP_LAG,
    HTTP_REQUESTS,
    HTTP_SECONDS,
    ITERATION_TOKENS,
    KV_USAGE,
    LORA_INFO,
    LORA_ROWS,
    MEDIA_FAILURES,
    MEDIA_ROWS,
    PROCESS_MEMORY,
    PROMPT_MODALITIES,
    PROMPT_SOURCES,
    REQUESTS,
    SERVERS_MISSING,
    SLEEP_STATE,
    STAGE_UNITS,
    WAITING_REASONS,
    MetricFamily,
)

SECTIONS: dict[str, tuple[MetricFamily, ...]] = {
    "Requests": REQUESTS,
    "Engine": (
        *(ENGINE_UP, SLEEP_STATE, KV_USAGE, CACHE_CONFIG, WAITING_REASONS, ITERATION_TOKENS),
        *(ACCEPTED_AT, PROMPT_MODALITIES, PROMPT_SOURCES, LORA_INFO),
        *(row.family for row in (*LORA_ROWS, *ENGINE_ROWS)),
    ),
    "Media": (
        *(family for family, _ in STAGE_UNITS),
        MEDIA_FAILURES,
        *(row.family for row in MEDIA_ROWS),
    ),
    "Encoders apart": (
        *(row.family for row in ENCODER_ROWS),
        ENCODER_FALLBACKS,
        ENCODER_REFUSED,
    ),
    "HTTP server": (HTTP_REQUESTS, HTTP_SECONDS, EVENT_LOOP_LAG, SERVERS_MISSING),
    "Processes": (PROCESS_MEMORY,),
}
"""All families, in the sections of ``docs/metrics.md``."""

FAMILIES = tuple(family for section in SECTIONS.values() for family in section)

_INTRODUCTION = """# Metrics

`GET /metrics` returns all metrics in Prometheus' text format. This page is generated from
`sensorium.metrics.families` by `scripts/metrics_docs`; edit the families, not the page.

Names have the prefix `sensorium:` or that of `--metrics-prefix`. Most are vLLM's, so with
`--metrics-prefix vllm:` its dashboards work. Metrics of HTTP (`http_...`) have no prefix: they have
the names that dashboards for FastAPI expect. Counters are scraped with `_total`, histograms as
`_bucket`, `_sum` and `_count`; series of creation times (`_created`) are left out.

Every series has the labels `model_name` and `engine` (0, or the id of a replica); further labels
are listed. With several processes for HTTP (`--api-server-count`) an answer has the metrics of all of
them, and those of requests, media, HTTP and memory have the label `server`, the id of the process;
those of a process that does not reply within two seconds are left out, which `servers_missing`
counts. A server of several models has series of each, by its first name; the event loop and
HTTP requests that name no model have an empty `model_name`. `handler` is the template of a route,
such as `/v1/models/{name:path}`, or `none` for a request without a route. `status` is `2xx`,
`4xx` and so on, `code` the status itself. A request that is refused before it reaches the engine
counts as an HTTP request only.

Counters of the engine start at 0 again after a restart, as Prometheus expects; those of requests,
media and HTTP continue. Where an engine is ended because no request needs it, those of media start
again, too. While there is no engine, its metrics keep their last values and `engine_up` is 0.

`examples/grafana/sensorium.json` is a dashboard: import it into Grafana and choose the data source.
Its variable `prefix` is for servers with another prefix.
"""


def metrics_markdown() -> str:
    """Return the page."""
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
