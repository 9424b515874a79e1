"""Passes that decide what is quantized and how, and insert it."""
