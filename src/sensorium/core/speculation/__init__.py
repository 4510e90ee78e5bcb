"""Speculative decoding without a draft model: what is proposed, and whether that pays."""
