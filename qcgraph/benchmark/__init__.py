"""Measure the latency of a bundle against the baselines that a user would pick, paired in one run.

Every candidate samples the same latents with the same number of steps and threads. Candidates are warmed up, and take
turns round after round in one process. In addition, each candidate runs alone in a process of its own, which shows its
peak memory, and whether pairing slows it. Baselines are built in processes of their own, too, because quantizers patch
libraries and exporters leave memory behind; neither may reach the process that times.

The cost of pairing (DiT-S/2, 12 steps, two threads, nine candidates): all runtimes except PyTorch took 1 to 3 % longer
than alone. PyTorch was 5 to 13 % faster: in a process of its own, malloc gave memory back after many operations and the
kernel had to provide it again, 17,000 page faults for each forward, which the larger heap of the shared process avoids.
Speed-ups against PyTorch are smaller for this reason.

Importing the modules of this package imports no torch, so that a process for one candidate loads only the runtime of
this candidate.
"""
