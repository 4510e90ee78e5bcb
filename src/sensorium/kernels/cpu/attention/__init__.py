"""Attention on the CPU: paged and causal of decoders, full over segments of encoders."""
