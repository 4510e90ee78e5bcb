"""Where decoding runs: worker processes and threads."""
