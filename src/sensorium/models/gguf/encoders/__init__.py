"""Vision encoders in GGUF files of their own (``mmproj``)."""
