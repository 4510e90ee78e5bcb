"""Structured outputs: grammars compiled in a helper process, and matchers beside the steps."""
