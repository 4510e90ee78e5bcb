"""Replicas offline: rows of Ray Data through processes that prepare prompts, and engines."""
