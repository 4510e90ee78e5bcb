"""Media in, features out: references, guard, fetch, decoding, digests, caches. Knows nothing of the engine."""
