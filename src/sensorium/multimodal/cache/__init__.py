"""Cache of preprocessed features, keyed by digests of items."""
