"""Files of a checkpoint, and their weights."""
