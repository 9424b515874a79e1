"""Judge the bundles of tools/pareto.py: quality against full precision, and latency in turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial

import numpy as np
from pareto_report import Cell

from qcgraph.benchmark.timing import paired
from qcgraph.benchmark.turns import Turn, first_step
from qcgraph.evaluation.bootstrap import Bootstrap
from qcgraph.evaluation.evaluate import CONVERGED_SAMPLES
from qcgraph.evaluation.faults import error_ratio
from qcgraph.evaluation.metrics import choose_metrics
from qcgraph.evaluation.rows import EvaluatedSetting, Measuring
from qcgraph.evaluation.settings import Subject, compiled, converged, full_precision
from qcgraph.evaluation.tally import Tallying, Trajectory, Values
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import in_turn

METRICS = ("psnr", "fid_small", "accuracy")


class Judging:
    """Judges subjects of a model against its full precision, with the same noise for all.

    Args:
        subject: the model, with all steps computing.
        samples: samples of each seed.
        seeds: number of seeds.

    Attributes:
        exact: the measurements of full precision itself.
        floor: PSNR between the converged reference and itself with half the steps, dB.
    """

    def __init__(self, subject: Subject, samples: int, seeds: int) -> None:
        make_judge = subject.model.judge
        judge = make_judge() if make_judge else None
        self._conditions = in_turn(samples, subject.spec)
        labels = self._conditions.labels(subject.spec).tolist()
        self._metrics = choose_metrics(METRICS if judge else METRICS[:1], judged=bool(judge), model=subject.spec.name)
        self._bootstrap = Bootstrap(seeds, labels)
        setting = full_precision(subject)
        self._exact = {seed: Trajectory.draw(setting, self._conditions, seed) for seed in range(seeds)}
        tallying = Tallying(setting, len(subject.plan), subject.spec.latent_shape[0])
        for trajectory in self._exact.values():
            tallying.take(trajectory)
        reference, first = tallying.tally(), self._conditions[:CONVERGED_SAMPLES]
        goal, half = (setting.draw(first, 0, None) for setting in converged(subject) if setting.draw)
        self._measuring = Measuring(subject.spec, labels, judge, self._bootstrap, reference, goal)
        self.floor = self._measuring.plain_psnr(half, goal)
        self.exact = _metrics(self._measuring.row(reference, self._metrics))

    def judge(self, subjects: Mapping[str, Subject], progress: Progress) -> dict[str, Cell]:
        """Measure subjects at one budget, and compare each of them with the best."""
        cells, errors = {}, {}
        for key, subject in progress.track(list(subjects.items()), "judging"):
            row, errors[key] = self._draw(subject)
            cells[key] = _metrics(row) | {"median_psnr": float(self._measuring.decibels(np.median(errors[key])))}
        best = min(errors, key=lambda key: float(errors[key].mean()))
        for key, cell in cells.items():
            cell["behind_db"] = asdict(error_ratio(self._bootstrap, errors[key], errors[best]))
        return cells

    def _draw(self, subject: Subject) -> tuple[EvaluatedSetting, Values]:
        setting = replace(compiled(subject), moments=())  # some take other steps, so only final latents are compared
        tallying = Tallying(setting, len(subject.plan), subject.spec.latent_shape[0])
        for seed, trajectory in self._exact.items():
            tallying.add(self._conditions, seed, trajectory)
        tally = tallying.tally()
        return self._measuring.row(tally, self._metrics), self._measuring.squared_errors(tally)


def _metrics(row: EvaluatedSetting) -> Cell:
    metrics = {name: asdict(estimate) for name, estimate in (row.metrics or {}).items()}
    return metrics | {"converged_psnr": row.converged_psnr}


def latencies(subjects: Mapping[str, Subject], baseline: Subject, rounds: int, progress: Progress) -> dict[str, Cell]:
    """Measure the milliseconds of a whole image, with subjects in turn, and the speed-up over a baseline."""
    runners = {"": baseline, **subjects}
    turns = {key: partial(Turn(each.plan, each.spec, 1).draw, each.runner) for key, each in runners.items()}
    first = {key: partial(Turn(first_step(each.plan), each.spec, 1).draw, each.runner) for key, each in runners.items()}
    for turn in turns.values():
        turn()
    timings = paired(turns, rounds, first, progress)
    return {
        key: {
            "sampling_ms": {name: 1000 * getattr(timings[key], name) for name in ("minimum", "median", "maximum")},
            "speedup": timings[""].median / timings[key].median,
        }
        for key in subjects
    }
