"""Models that qcgraph compiles: the embedded digits, the original DiT, diffusers folders, your own factory."""




