"""Kernels that replace the functions in reference.py with the same names and signatures."""
