"""Batches without a server."""
