"""Passes that decide which operations are quantized and how, and insert the quantizers."""
