"""Batches: files of requests, answered one line each."""
