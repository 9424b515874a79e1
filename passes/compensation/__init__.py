"""Passes that fit and insert corrections of the noise prediction."""
