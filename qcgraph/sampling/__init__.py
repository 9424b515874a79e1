"""Sampling with a runner: the loop, the state of caches, the check of hosts, and denoisers. NumPy, no torch."""
