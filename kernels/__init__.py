"""Triton kernels, one a file, each beside the torch function that defines it."""
