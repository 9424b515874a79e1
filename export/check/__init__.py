"""Checks that what was exported is what the program computes."""
