"""Quantized checkpoints as they are published: how each format stores its weights."""
