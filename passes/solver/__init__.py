"""Passes that choose the steps of a fitted solver, and that fit its coefficients."""
