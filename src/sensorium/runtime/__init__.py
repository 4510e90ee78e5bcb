"""Runs step plans on a device: slots, inputs, KV cache, encoder, sampler."""
