"""Loading of media, from references to features: fetching, decoding, digests, caches."""

from sensorium.multimodal.inputs import MultiModalDataDict, MultiModalUUIDDict

__all__ = ["MultiModalDataDict", "MultiModalUUIDDict"]
