"""Constraints on what is generated."""
