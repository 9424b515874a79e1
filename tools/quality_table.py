"""The first table of the README: what quantization, caching and compensation cost and gain on a model.

    python tools/quality_table.py digits --steps 50 --interval 3

Every row starts from the same noise. PSNR is against PyTorch eager in full precision; accuracy is that of the shipped
classifier, so it is printed for `digits` only; latency is of whole sampling, all rows in turn in one run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from measuring import EagerRunner, paired, psnr

from qcgraph import compile as compile_bundle
from qcgraph.bundle import Bundle
from qcgraph.images import save_grid
from qcgraph.models import load_model
from qcgraph.models.classifier import load_classifier
from qcgraph.recipe import Recipe
from qcgraph.runtime import open_runner
from qcgraph.sampling import Array, Runner, sample
from qcgraph.steps import StepPlan

REFERENCE = "full precision, PyTorch eager"


def main() -> None:
    """Compile every row, sample, print the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    labels = [index % model.spec.class_count for index in range(options.samples)]
    base = Recipe().override(
        steps=options.steps, scheduler=options.scheduler, guidance=options.guidance, groups=options.groups
    )
    off = base.override(bits="off", cache="off", compensate="off")
    cache = f"interval={options.interval}"
    fewer = round(options.steps * len(range(0, options.steps, options.interval)) / options.steps)
    recipes = {
        "full precision": off,
        f"quantization only ({options.bits})": off.override(bits=options.bits),
        f"cache only ({cache})": off.override(cache=cache),
        "both": off.override(bits=options.bits, cache=cache),
        "both + variance compensation": off.override(bits=options.bits, cache=cache, compensate="vc"),
        f"fewer steps ({fewer})": off.override(steps=fewer),
    }
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            name: compile_bundle(model, recipe, output=Path(folder) / str(index))
            for index, (name, recipe) in enumerate(recipes.items())
        }
        measure(bundles, EagerRunner(model), labels, options)


def measure(bundles: dict[str, Bundle], eager: EagerRunner, labels: list[int], options: argparse.Namespace) -> None:
    """Sample every row with every seed, then time all rows in turn, then print."""
    first = next(iter(bundles.values()))
    rows: dict[str, tuple[Runner, StepPlan]] = {REFERENCE: (eager, first.plan)}
    rows |= {name: (open_runner(bundle, None, options.threads), bundle.plan) for name, bundle in bundles.items()}

    def draw(name: str, seed: int) -> Array:
        runner, plan = rows[name]
        return sample(runner, plan, first.spec, labels, seed=seed, batch=len(labels))

    images = {name: [draw(name, seed) for seed in options.seeds] for name in rows}
    timings = paired({name: (lambda name=name: draw(name, options.seeds[0])) for name in rows}, options.rounds)
    if options.grid:
        save_rows(images, first, options.grid)
    print(f"{options.model}, {first.plan.describe()}")
    print(f"{len(labels)} samples a seed, seeds {options.seeds}, {options.threads} threads\n")
    print("| setting | PSNR dB, mean (least .. most) | class accuracy | sampling s (min / median / max) | speed-up |")
    print("|---|---|---|---|---|")
    for name, drawn in images.items():
        ratio = timings[REFERENCE].median / timings[name].median
        quality = (
            "-" if name == REFERENCE else spread([psnr(*pair) for pair in zip(drawn, images[REFERENCE], strict=True)])
        )
        print(f"| {name} | {quality} | {accuracy(drawn, labels, options.model)} | {timings[name]} | {ratio:.2f}x |")
    assert all(np.isfinite(batch).all() for drawn in images.values() for batch in drawn)


def spread(values: list[float]) -> str:
    """Mean, least and most."""
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} .. {max(values):.1f})"


def accuracy(drawn: list[Array], labels: list[int], model: str) -> str:
    """The share of samples that the shipped classifier takes for their class, over all seeds."""
    if model != "digits":
        return "-"
    classifier = load_classifier()
    shares = [classifier.accuracy(torch.from_numpy(batch), torch.tensor(labels)) for batch in drawn]
    return f"{sum(shares) / len(shares):.3f}"


def save_rows(images: dict[str, list[Array]], bundle: Bundle, path: Path) -> None:
    """A picture with a row a setting: the first ten samples of the first seed."""
    rows = [drawn[0][:10] for drawn in images.values()]
    save_grid(np.concatenate(rows), path, len(rows[0]), is_image=bundle.spec.is_image)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--interval", type=int, default=3)
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 2000, 3000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--grid", type=Path, help="also save a picture, a row a setting")
    return parser.parse_args()


if __name__ == "__main__":
    main()
