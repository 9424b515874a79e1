"""Measure the quality that a bundle loses, and the part that loses it: fidelity, distribution, attribution, faults."""
