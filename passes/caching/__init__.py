"""Passes that decide which steps compute, and forecast what the others reuse."""
