"""Processes of this program: their start, their limits, fork servers."""
