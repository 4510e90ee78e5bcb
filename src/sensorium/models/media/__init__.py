"""Preprocessing that families share: pixels, log-mel features, precomputed embeddings, options."""
