"""Passes that decide which steps compute, and that forecast the cached values of reusing steps."""
