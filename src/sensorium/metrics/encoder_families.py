"""Table of the metrics of replicas that encode media apart from engines."""

from __future__ import annotations

from sensorium.metrics.families import Kind, MetricFamily, Row


def _row(kind: Kind, name: str, field: str, help: str) -> Row:
    return Row(MetricFamily(name, kind, help), field)


ENCODER_ROWS = (
    _row("gauge", "encoder_replica_waiting", "num_waiting", "Items at one of --encoder-replicas."),
    _row("counter", "encoder_replica_items", "num_items", "Items that it has encoded."),
    _row("counter", "encoder_replica_failures", "num_failed", "Items that it could not encode."),
    _row("counter", "encoder_replica_seconds", "seconds", "Seconds that it spent on encoding."),
    _row("counter", "encoder_replica_bytes", "num_bytes", "Bytes of embeddings that it made."),
    _row("gauge", "encoder_replica_weight_bytes", "weight_bytes", "Memory of its linear layers."),
)
ENCODER_REASONS = ("no_encoder", "other_weights", "failed", "adapter")
ENCODER_FALLBACKS = MetricFamily(
    "encoder_fallback_items",
    "counter",
    "Items that engines had to encode although there are --encoder-replicas, by reason: no_encoder "
    "(none was there), other_weights (or another device, dtype or options), failed (it could not "
    "be encoded), adapter (one that changes the encoder).",
    ("reason",),
)
ENCODER_REFUSED = MetricFamily(
    "encoder_refused_items",
    "counter",
    "Items that were refused because encoders had ended with them.",
)
