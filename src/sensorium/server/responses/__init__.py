"""OpenAI's Responses API: items in, items and events out, over the same generation as chat."""
