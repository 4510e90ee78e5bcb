"""Decides: scheduler, block pool, prefix index. Pure Python: no torch, no numpy."""
