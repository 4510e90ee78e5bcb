"""What surrounds the layers of a decode step: look-up, choice of the next token, the next step."""
