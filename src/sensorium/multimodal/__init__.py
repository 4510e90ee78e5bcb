"""Media in, features out: references, guard, fetch, decoding, digests, caches. Knows nothing of the engine."""

from sensorium.multimodal.inputs import MultiModalDataDict, MultiModalUUIDDict

__all__ = ["MultiModalDataDict", "MultiModalUUIDDict"]
