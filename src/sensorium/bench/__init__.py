"""Measurements of ``sensorium bench``: server load, throughput, latency, start-up."""
