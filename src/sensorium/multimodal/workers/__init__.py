"""Worker processes and threads in which decoding runs."""
