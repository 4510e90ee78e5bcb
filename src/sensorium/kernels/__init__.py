"""Performance-critical operations: a dispatch table, PyTorch references and CPU kernels."""
