"""OpenAI's protocol: bodies, sampling parameters, chunks."""
