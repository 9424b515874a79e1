"""Passes that sample what later ones decide on."""
