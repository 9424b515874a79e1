"""Latency of a bundle against the baselines that a user would pick, paired in one run.

Every candidate samples the same latents with the same number of steps and threads. They are warm, and take turns round
after round in one process. Beside that each runs alone in a process of its own, which tells its peak memory and
whether being paired slows it. Baselines are built there too, because quantizers patch what they touch and exporters
leave memory behind; nothing of that may reach the process that times.

What pairing costs (DiT-S/2, 12 steps, two threads, nine candidates): runtimes but PyTorch took 1 to 3 % longer than
alone. PyTorch was 5 to 13 % faster: in a process of its own, malloc gave memory back after many operations and the
kernel had to provide it again, 17,000 page faults a forward, which the larger heap of the shared process avoids.
Speed-ups against it are the smaller for it.

Importing the modules of this package imports no torch, so a process that runs one candidate holds that candidate's
runtime alone.
"""
