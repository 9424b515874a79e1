"""Count false alarms: sound exported graphs that parity refuses, over random models and draws of samples.

    python tools/parity_alarms.py [--models 3] [--draws 60] [--tokens 4] [--depth 1] [--bits w8a8] [--target NAME]

Each model is a random diffusers DiT, compiled and compared with its graph on a number of draws of random input. Prints
the number of draws that fail, and the largest share of the limit among the draws that pass.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import qcgraph
from qcgraph.errors import VerificationError
from qcgraph.export.check.check import Check
from qcgraph.export.check.parity import check_outputs
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.ir.serialize import load_program
from qcgraph.recipe import Recipe

RECIPE = """
[calibration]
trajectories = 2
[quantization]
scales = "range"
rounding = "nearest"
equalize = false
"""
PATCH = 2


def compiled(options: argparse.Namespace, seed: int, folder: Path) -> Path:
    """Compile a random DiT; return the folder of the bundle."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        num_layers=options.depth,
        sample_size=PATCH * int(options.tokens**0.5),
        patch_size=PATCH,
        num_embeds_ada_norm=5,
        norm_elementwise_affine=False,
    )
    transformer.save_pretrained(folder / "dit")
    recipe = Recipe.from_toml(RECIPE).override(target=options.target, steps=2, bits=options.bits, groups=2)
    try:
        return qcgraph.compile(str(folder / "dit"), recipe, output=folder / "bundle").path
    except VerificationError:  # this is one of the alarms; the refused bundle is kept
        return folder / "bundle.rejected"


def checks(bundle: Path, draws: int) -> Iterator[Check]:
    """Compare the graphs of a bundle with its program, once for each draw."""
    program = load_program(bundle)
    runner = OnnxRuntimeRunner(bundle, program.interfaces)
    for draw in range(draws):
        for variant in program.variants:
            yield from check_outputs(program, variant, runner, draw)


def main() -> None:
    """Compile all models, compare them, and count the alarms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=4, help="of an image; a square")
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--target", default="onnx-opset21")
    options = parser.parse_args()
    used: list[float] = []
    for seed in range(options.models):
        with tempfile.TemporaryDirectory() as name:
            found = list(checks(compiled(options, seed, Path(name)), options.draws))
        for check in found:
            if not check.passed:
                print(f"model {seed}: {check.name} of {check.variant}: {check.detail}")
        used += [check.value / check.limit for check in found]
    alarms = np.array(used) > 1
    largest = np.max(np.array(used)[~alarms], initial=0.0)
    print(f"{alarms.sum()} of {len(used)} checks fail; the others take at most {100 * largest:.0f} % of their limits")


if __name__ == "__main__":
    main()
