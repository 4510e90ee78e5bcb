"""The model families, a folder each, and any other model of transformers (``hf``)."""
