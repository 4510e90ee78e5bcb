"""Prompts turned into requests of the engine."""
