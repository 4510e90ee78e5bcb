"""Counters and their Prometheus form."""
