"""Test whether one loaded denoiser is ever wrong: threads, turns, and thousands of trajectories.

    python tools/stress_denoiser.py out/digits --tries 1000 --workers 8
    python tools/stress_denoiser.py out/digits --trajectories 2000

Every try runs some trajectories at once on one denoiser, and compares each result with that of the trajectory alone, to
the last bit. A trajectory is right, refused (with an error of qcgraph) or wrong; some of them stop early. The ways to
run at once:

* threads: in threads that share the denoiser, sampling as the plan does;
* own-updates: in such threads, with latents of their own, on a denoiser that accepts any latents;
* turns: in turns on one thread, in random order, half of the tries with latents of their own;
* requests: in threads, each with a request of its own: none may be refused;
* moving: one trajectory after another, every step in another thread: none may be refused.

With --trajectories, that number of trajectories run one after another on one denoiser; results have to stay the same to
the last bit, and the growth of memory is printed. Exits with 1 if a trajectory is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import qcgraph
from qcgraph.benchmark.machine import resident_bytes
from qcgraph.errors import QcgraphError
from qcgraph.plan.spec import ModelSpec
from qcgraph.sampling.conditions import in_turn, joined
from qcgraph.sampling.denoiser import Denoiser
from qcgraph.sampling.loop import Sampler
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Array

RIGHT, REFUSED, WRONG, GIVEN_UP = "right", "refused", "wrong", "given up"
COUNTED = (RIGHT, REFUSED, WRONG, GIVEN_UP)


@dataclass(frozen=True)
class Host:
    """A trajectory of one sample, as a host draws it.

    Attributes:
        seed: the seed of its noise.
        kind: the index of its conditions, such as its class, among those that samples take in turn.
        null_first: whether the unconditional half of a batch comes first.
        own: whether its latents are drawn anew at every step, and follow from no prediction.
        gives_up: the step at which it stops; None if it completes.
    """

    seed: int
    kind: int
    null_first: bool = False
    own: bool = False
    gives_up: int | None = None

    def walk(self, denoiser: Denoiser) -> Generator[None, None, Array]:
        """Take a step, pause, and continue; return the latent after the last step."""
        plan, spec = denoiser.plan, denoiser.spec
        noise, weight = Noise(self.seed, [0], spec.latent_shape), np.float32(plan.fingerprint.guidance)
        sampler, latent = Sampler(plan, noise), noise.initial()
        drawn = np.random.default_rng(self.seed)
        for index, step in enumerate(plan.steps):
            if index == self.gives_up:
                return latent
            prediction = self._predict(denoiser, latent, step.timestep, weight)
            latent = sampler.update(index, latent, prediction)
            if self.own:
                latent = latent * 0 + drawn.standard_normal(latent.shape, dtype=np.float32) + 0.01 * prediction
            yield
        return latent

    def _predict(self, denoiser: Denoiser, latent: Array, timestep: float, weight: np.float32) -> Array:
        channels = denoiser.spec.latent_shape[0]
        conditions = in_turn(self.kind + 1, denoiser.spec)[self.kind :]
        if weight == 1:
            return np.asarray(denoiser(latent, timestep, **conditions.values).sample[:, :channels])
        both = [conditions, conditions.unconditional(denoiser.spec)]
        if self.null_first:
            both.reverse()
        together = np.concatenate([latent, latent])
        halves = np.split(denoiser(together, timestep, **joined(both).values).sample[:, :channels], 2)
        conditional, null = reversed(halves) if self.null_first else halves
        return np.asarray(null + weight * (conditional - null))


def ended(walk: Generator[None, None, Array]) -> Array:
    """Return the result of an uninterrupted trajectory."""
    while True:
        try:
            next(walk)
        except StopIteration as end:
            return np.asarray(end.value)


class Referee:
    """Judges the outcome of a trajectory by its result alone.

    Args:
        denoiser: the denoiser whose requests draw the right results.
        own_updates: the same denoiser, loaded so that it accepts any latents.
    """

    def __init__(self, denoiser: Denoiser, own_updates: Denoiser) -> None:
        self._denoisers = {False: denoiser, True: own_updates}
        self._right: dict[Host, Array] = {}

    def right(self, host: Host) -> Array:
        """Return the result of a trajectory alone."""
        if host not in self._right:
            self._right[host] = ended(host.walk(self._denoisers[host.own].request()))
        return self._right[host]

    def outcome(self, host: Host, walk: Callable[[], Array]) -> str:
        """Return the outcome of a trajectory: right, refused, given up or wrong."""
        try:
            result = walk()
        except QcgraphError:
            return REFUSED
        if host.gives_up is not None:
            return GIVEN_UP
        return RIGHT if np.array_equal(result, self.right(host)) else WRONG


def kinds(spec: ModelSpec) -> int:
    """Return the number of samples in turn with different conditions."""
    return max((condition.count or 1 for condition in spec.conditions), default=1)


def draw_hosts(generator: random.Random, denoiser: Denoiser, count: int, *, own: bool, all_end: bool) -> list[Host]:
    """Draw trajectories that are easily mistaken for each other: few seeds, two classes."""
    hosts = []
    for _ in range(count):
        gives_up = generator.randrange(1, len(denoiser.plan)) if generator.random() < 0.1 and not all_end else None
        null_first = not denoiser.plan.restores_half and generator.random() < 0.3
        kind = generator.randrange(min(2, kinds(denoiser.spec)))
        hosts.append(Host(generator.randrange(50), kind, null_first, own, gives_up))
    return hosts


def in_threads(judge: Referee, hosts: Sequence[Host], denoisers: Sequence[Denoiser]) -> list[str]:
    """Run each trajectory in a thread of its own; all threads start at once."""
    start = threading.Barrier(len(hosts))

    def run(host: Host, denoiser: Denoiser) -> str:
        start.wait()
        return judge.outcome(host, lambda: ended(host.walk(denoiser)))

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(run, hosts, denoisers))


def in_turns(judge: Referee, hosts: Sequence[Host], denoiser: Denoiser, generator: random.Random) -> list[str]:
    """Run trajectories on one thread, one step of a random trajectory at a time."""
    walks = {host: host.walk(denoiser) for host in hosts}
    found = []
    while walks:
        host = generator.choice(list(walks))
        try:
            next(walks[host])
        except StopIteration as end:
            result = np.asarray(end.value)
            found.append(judge.outcome(host, lambda result=result: result))  # type: ignore[misc]
            del walks[host]
        except QcgraphError:
            found.append(REFUSED)
            del walks[host]
    return found


def moving(judge: Referee, host: Host, denoiser: Denoiser, pool: ThreadPoolExecutor) -> str:
    """Run a trajectory, each step in any free thread."""
    walk = host.walk(denoiser)

    def step() -> Array | None:
        try:
            next(walk)
        except StopIteration as end:
            return np.asarray(end.value)
        return None

    def run() -> Array:
        while (result := pool.submit(step).result()) is None:
            pass
        return result

    return judge.outcome(host, run)


def stress(
    denoiser: Denoiser, own_updates: Denoiser, tries: int, workers: int, seed: int, ways: Sequence[str]
) -> dict[str, Counter[str]]:
    """Run trajectories at once in several ways.

    Args:
        denoiser: the denoiser of a bundle.
        own_updates: the denoiser of the same bundle, loaded with ``own_updates=True``.
        tries: the number of tries.
        workers: the number of trajectories in a try.
        seed: seeds the trajectories.
        ways: the ways to run at once (see the module).

    Returns:
        The number of trajectories with each outcome, by way.
    """
    generator, judge = random.Random(seed), Referee(denoiser, own_updates)
    found: dict[str, Counter[str]] = {way: Counter() for way in ways}
    with ThreadPoolExecutor(workers) as pool:
        for number in range(tries):
            for way in ways:
                own = way == "own-updates" or (way == "turns" and number % 2 == 1)
                shared = own_updates if own else denoiser
                all_end = way in ("requests", "moving")
                hosts = draw_hosts(generator, shared, workers, own=own, all_end=all_end)
                if own:
                    shared.restart()  # a trajectory of the previous try stopped early
                if way == "turns":
                    found[way].update(in_turns(judge, list(dict.fromkeys(hosts)), shared, generator))
                elif way == "moving":
                    found[way].update(moving(judge, host, shared, pool) for host in hosts[:2])
                else:
                    each = [shared.request() if way == "requests" else shared for _ in hosts]
                    found[way].update(in_threads(judge, hosts, each))
    return found


WAYS = ("threads", "own-updates", "turns", "requests", "moving")


def repeat(denoiser: Denoiser, trajectories: int) -> dict[str, int]:
    """Draw the same samples repeatedly on one denoiser, and measure the memory.

    Returns:
        ``right`` and ``wrong`` trajectories; resident bytes after the first tenth and at the end.
    """
    hosts = [Host(seed, seed % kinds(denoiser.spec)) for seed in range(4)]
    first = [ended(host.walk(denoiser)) for host in hosts]
    counts: Counter[str] = Counter()
    settled = 0
    for number in range(trajectories):
        which = number % len(hosts)
        same = np.array_equal(ended(hosts[which].walk(denoiser)), first[which])
        counts[RIGHT if same else WRONG] += 1
        if number == trajectories // 10:
            settled = resident_bytes() or 0
    return {RIGHT: counts[RIGHT], WRONG: counts[WRONG], "settled_bytes": settled, "end_bytes": resident_bytes() or 0}


def main() -> int:
    """Run the tests, and print the outcomes."""
    options = parse()
    sys.setswitchinterval(1e-5)  # threads switch as often as possible
    denoiser = qcgraph.load(options.bundle, backend=options.backend, threads=1)
    if options.trajectories:
        found = repeat(denoiser, options.trajectories)
        growth = found["end_bytes"] - found["settled_bytes"]
        print(f"{options.trajectories} trajectories on one load: {found[RIGHT]} as the first, {found[WRONG]} not")
        print(f"resident memory: {found['settled_bytes']} bytes after a tenth, {growth:+d} bytes since then")
        return int(found[WRONG] > 0)
    own_updates = qcgraph.load(options.bundle, backend=options.backend, threads=1, own_updates=True)
    counts = stress(denoiser, own_updates, options.tries, options.workers, options.seed, options.ways or WAYS)
    if options.json:
        print(json.dumps(counts))
    else:
        print(f"{'':12}" + "".join(f"{name:>10}" for name in COUNTED))
        for way, counted in counts.items():
            print(f"{way:12}" + "".join(f"{counted[name]:10}" for name in COUNTED))
    refused = sum(counts[way][REFUSED] for way in ("requests", "moving") if way in counts)
    return int(refused > 0 or any(counted[WRONG] for counted in counts.values()))


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=8, help="trajectories at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", dest="ways", action="append", choices=WAYS, help="by default all; can be repeated")
    parser.add_argument("--backend", default=None)
    parser.add_argument("--trajectories", type=int, default=0, help="draw as many one after the other instead")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
