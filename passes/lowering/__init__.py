"""Passes that bring a program into the form that runs fast on a target."""
