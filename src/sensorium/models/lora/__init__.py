"""LoRA adapters in PEFT's layout: reading, checking, and the layers that they change."""
