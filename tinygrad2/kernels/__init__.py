"""Kernels that take the place of functions of reference.py, by name and signature."""
