"""Checks that an exported graph computes the same as its program."""
