"""Surroundings of the layers in a decode step: look-up, choice of tokens, the step after it."""
