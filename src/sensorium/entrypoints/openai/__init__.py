"""The OpenAI-compatible server under its older name."""
