"""Programs that are exported once and tested from all sides."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcgraph.bundle import Bundle, write_plan, writing
from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.export.targets import TARGETS
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.plan.spec import Interface, ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe

TARGET = TARGETS["onnxruntime-cpu"]
CALIBRATE = "calibrate{trajectories=2},group-timesteps{groups=3}"
QUANTIZE = f"{CALIBRATE},plan-quant{{pair-high={TARGET.pair_high}}},insert-qdq"
CACHE = "plan-cache{interval=3},insert-cache"
COMPENSATE = "fit-compensation,insert-compensation"


@dataclass(frozen=True)
class Export:
    """A program, and the folder that it was exported to."""

    program: Program
    folder: Path

    @property
    def interfaces(self) -> Mapping[str, Interface]:
        return {name: variant.interface for name, variant in self.program.variants.items()}

    def runner(self) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner(self.folder, self.interfaces)


def exported(program: Program, folder: Path, *, integer_products: bool = TARGET.integer_products) -> Export:
    emit_onnx(program, folder, TARGET.opset, Progress(), integer_products=integer_products)
    return Export(program, folder)


@pytest.fixture(scope="session")
def export_of() -> Callable[..., Export]:
    """Exports a program to a folder."""
    return exported


@pytest.fixture(scope="session")
def unquantized(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The tiny denoiser in floating point, with a cache: variants full and reuse."""
    return exported(Pipeline.parse(CACHE).run(captured), tmp_path_factory.mktemp("unquantized"))


@pytest.fixture(scope="session")
def forecasting(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """In floating point, branches cached in two modes that overlap, forecast from three computing steps."""
    cache = 'plan-cache{interval=3 history=3 what=branches blocks="0..1+1..1"},insert-cache,calibrate{trajectories=2}'
    program = Pipeline.parse(cache).run(captured)
    schedule = ["full", "full", "reuse", "full", "reuse_1", "full", "reuse", "reuse_1", "reuse"]
    program = program.with_facts(program.facts[StepPlan].with_variants(schedule))
    program = Pipeline.parse("insert-forecast,fit-forecast").run(program)
    return exported(program, tmp_path_factory.mktemp("forecasting"))


@pytest.fixture(scope="session")
def compiled(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """All at once: cache, 8-bit linears in three timestep groups, compensation, lowered for ONNX Runtime."""
    pipeline = Pipeline.parse(f"{CACHE},{QUANTIZE},{COMPENSATE},{TARGET.legalize}")
    return exported(pipeline.run(captured), tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def constant_scales(captured: Program) -> Program:
    """A cache, and linears of 8 by 6 bits with constant scales and ratios of three timestep groups."""
    quantize = f"{CALIBRATE},plan-quant{{symmetric=true activation-bits=6}},insert-qdq"
    return Pipeline.parse(f"{CACHE},{quantize},lower-linear,reference-scales").run(captured)


@pytest.fixture(scope="session")
def dequantizing(compiled: Export, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The same with products of dequantized values, whose biases stay outside the int8 kernels."""
    return exported(compiled.program, tmp_path_factory.mktemp("dequantizing"), integer_products=False)


@pytest.fixture
def not_lowered(captured: Program, tmp_path: Path) -> Export:
    """Quantized, without the legalization of the target."""
    return exported(Pipeline.parse(QUANTIZE).run(captured), tmp_path)


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[[Export], Bundle]:
    """Makes a bundle of what was exported, as far as running it needs."""

    def made(export: Export) -> Bundle:
        path, facts = tmp_path / "bundle", export.program.facts
        with writing(path, model="tiny", target=TARGET.name) as folder:
            write_plan(folder, facts[ModelSpec], facts[StepPlan], export.interfaces)
            (folder / "recipe.lock.toml").write_text(Recipe().to_toml())
            for name in ("weights.safetensors", *(f"{variant}.onnx" for variant in export.interfaces)):
                shutil.copyfile(export.folder / name, folder / name)
        return Bundle.open(path)

    return made
