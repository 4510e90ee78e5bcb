"""Building blocks of models: linear, norm, rotary, attention, MLP."""
