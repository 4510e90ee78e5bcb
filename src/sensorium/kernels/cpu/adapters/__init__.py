"""Low-rank adapters on the CPU."""
