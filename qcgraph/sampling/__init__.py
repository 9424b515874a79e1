"""Sampling with a runner: the loop, the state of caches, what a host may do, and denoisers. NumPy, no torch."""
