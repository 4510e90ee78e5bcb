"""Parsing of what callers pass into references to media."""
