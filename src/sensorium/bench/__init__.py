"""What ``sensorium bench`` runs: load against a server, offline throughput and latency, start-up."""
