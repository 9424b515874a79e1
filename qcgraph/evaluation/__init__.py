"""What a bundle costs in quality, and which part of it: same-noise fidelity, distribution, attribution, faults."""
