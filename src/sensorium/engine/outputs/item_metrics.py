"""Metrics of the media items of a request."""

from __future__ import annotations

from sensorium.multimodal.items import FRAMES, MediaItem
from sensorium.outputs import ItemMetrics


def item_metrics(item: MediaItem) -> ItemMetrics:
    """Return what loading ``item`` took, and the frames of it that the model sees."""
    features, cost = item.features, item.cost
    frames = features.meta.get(FRAMES, {})
    return ItemMetrics(
        place=cost.place,
        modality=item.modality,
        num_embeds=features.num_embeds,
        cached=cost.cached,
        fetch_seconds=cost.fetch_seconds,
        decode_seconds=cost.decode_seconds,
        preprocess_seconds=cost.preprocess_seconds,
        frames=tuple(frames.get("indices", ())),
        fps=frames.get("fps"),
        num_source_frames=frames.get("num_source_frames"),
    )
