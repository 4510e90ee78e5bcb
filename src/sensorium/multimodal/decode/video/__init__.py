"""Videos to sampled frames."""
