"""LoRA adapters that requests load and unload."""
