"""Tests of checkpoints that are published quantized."""
