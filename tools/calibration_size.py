"""Measure how close a quantized model comes to full precision, for calibrations of several sizes.

    python tools/calibration_size.py digits
    python tools/calibration_size.py cifar10 --steps 13 --trajectories 2 8 16 32 64 --latents auto 32 --samples 24

A model is compiled without a cache for ONNX Runtime, once for every number of trajectories and of latents that the
quantizer is decided on. Its samples are compared with those of full precision, with the same steps and from the same
noise, which no calibration has seen: PSNR of the mean error, of the median sample and of the worst tenth. ``auto`` is
what a compilation takes by default.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import qcgraph
from qcgraph.capture.capture import capture
from qcgraph.errors import QcgraphError
from qcgraph.evaluation.metrics import peak, psnr, shown, spread
from qcgraph.evaluation.tally import mean_squares
from qcgraph.export.run.open import runner_of
from qcgraph.ir.execute import TorchRunner
from qcgraph.models import load_model
from qcgraph.progress import Progress, progress_for
from qcgraph.recipe import Recipe
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Array

Size = int | Literal["auto"]
Row = dict[str, Any]


class Measuring:
    """The samples of full precision, and the distances of quantized ones from them."""

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._model = load_model(options.model)
        self._exact: Array | None = None

    def rows(self, folder: Path) -> Iterator[Row]:
        """Yield a row for every size; bundles are written to the folder."""
        for latents in self._options.latents:
            for trajectories in self._options.trajectories:
                self._progress.note(f"{self._options.model}: {trajectories} trajectories, {latents} latents")
                yield self._row(trajectories, latents, folder / f"{trajectories}-{latents}")

    def _row(self, trajectories: Size, latents: Size, folder: Path) -> Row:
        asked = self._options
        recipe = Recipe.model_validate(
            {
                "sampling": {"steps": asked.steps, "guidance": asked.guidance},
                "quantization": {"bits": asked.bits},
                "calibration": {"trajectories": trajectories, "samples": latents, "seed": asked.calibration_seed},
                "gate": {"verdict": False},
            }
        )
        started = time.perf_counter()
        bundle = qcgraph.compile(asked.model, recipe, output=folder)
        seconds = time.perf_counter() - started
        conditions = in_turn(asked.samples, bundle.spec)

        def draw(runner: Any) -> Array:
            drawn = sample(runner, bundle.plan, bundle.spec, conditions, asked.seed, batch=asked.batch)
            return shown(drawn, bundle.spec)

        if self._exact is None:
            captured = capture(self._model.module, self._model.spec, self._model.input_names)
            self._exact = draw(TorchRunner(captured))
        errors, largest = mean_squares(draw(runner_of(bundle)), self._exact), peak(self._exact, bundle.spec)
        median, worst = spread(psnr(errors, largest))
        return {
            "trajectories": trajectories,
            "latents": latents,
            "psnr": float(psnr(errors.mean(), largest)),
            "median": median,
            "worst": worst,
            "seconds": seconds,
        }


def main() -> int:
    """Compile and compare every size, and print the table."""
    options = parse()
    settings = {key: getattr(options, key) for key in ("model", "bits", "steps", "guidance", "samples", "seed")}
    try:
        with tempfile.TemporaryDirectory(prefix="qcgraph-") as folder:
            rows = list(Measuring(options, progress_for(sys.stderr)).rows(Path(folder)))
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    document = {"kind": "calibration-size", "format": 1, **settings, "rows": rows}
    print(json.dumps(document, indent=1) if options.json else markdown(document))
    return 0


def markdown(document: Mapping[str, Any]) -> str:
    """Return a row for every size."""
    settings = f"{document['bits']}, {document['steps']} steps, guidance {document['guidance']:g}"
    lines = [
        f"`{document['model']}`, {settings}, {document['samples']} samples: PSNR to full precision, dB.",
        "",
        "| trajectories | latents | of the mean error | median sample | worst tenth | seconds to compile |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        figures = f"{row['psnr']:.1f} | {row['median']:.1f} | {row['worst']:.1f} | {row['seconds']:.0f}"
        lines.append(f"| {row['trajectories']} | {row['latents']} | {figures} |")
    return "\n".join(lines)


def size(text: str) -> Size:
    """Return a number, or auto."""
    return "auto" if text == "auto" else int(text)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", metavar="MODEL")
    parser.add_argument("--trajectories", type=size, nargs="+", default=[2, 8, 16, 32, 64, "auto"], metavar="N")
    parser.add_argument("--latents", type=size, nargs="+", default=["auto"], metavar="N")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--steps", type=int, default=13, help="steps, all of which compute")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--calibration-seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="samples that run together; fewer take less memory")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
