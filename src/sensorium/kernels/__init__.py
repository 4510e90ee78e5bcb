"""The operations that must be fast: a dispatch table, plain-torch references, CPU kernels."""
