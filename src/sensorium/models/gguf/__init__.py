"""GGUF files: reading and checking them, their weights, configuration and tokenizer."""
