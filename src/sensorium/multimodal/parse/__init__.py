"""What callers pass, as references to media."""
