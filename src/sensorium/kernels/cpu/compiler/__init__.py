"""Numba's compiler, as kernels use it: the functions within them, and compiled code on disk."""
