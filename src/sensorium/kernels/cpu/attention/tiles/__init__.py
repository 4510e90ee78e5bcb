"""Attention by matrix tiles (AMX), and by their sums in vectors."""
