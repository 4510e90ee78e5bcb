"""The way of one call of ``LLM`` through the engine."""
