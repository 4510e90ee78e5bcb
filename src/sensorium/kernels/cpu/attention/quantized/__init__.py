"""Paged attention of decoders over a KV cache in int8, on any CPU."""
