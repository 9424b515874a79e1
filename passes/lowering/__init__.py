"""Passes that bring a program into the form that a target runs fast."""
