"""References to bytes: what may be fetched, and how."""
