"""A tiny captured denoiser that all tests may use, and golden texts."""

from __future__ import annotations

import difflib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.onnx._internal.exporter._registration import ONNXRegistry

from qcgraph.benchmark.machine import usable_cores
from qcgraph.capture.capture import capture
from qcgraph.export.check import parity
from qcgraph.ir.program import Program, tensor_digest
from qcgraph.models import LoadedModel
from qcgraph.models.dit import DiT, initialize_random
from qcgraph.models.eager import EagerRunner
from qcgraph.models.files import CARD_FILE, CLASSIFIER_FILE, DIGITS_FOLDER, WEIGHTS_FILE
from qcgraph.models.geometry import DiTConfig
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec

GOLDEN = Path(__file__).parent / "golden"
STEPS = 9
CONVERGED_STEPS = 60
SMALL_DEPTH = 2
CAPTURING = ("qcgraph.compiler.compilation.capture", "qcgraph.models.source.capture")  # where compilations look it up

# Graphs are many small objects that refer to each other: looking for garbage among them took a seventh of all time.
gc.set_threshold(100_000, 50, 100)
MANY_MODULES = 50

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers and the commands they start share the cores: PyTorch's threads wait for one another, and take tens of
    # times longer where two of them have to share one.
    _threads = max(1, usable_cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(_threads)
    torch.set_num_threads(_threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write the golden texts instead of comparing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: those that run last should be short, or one core waits for the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # stable, so that a file stays in its order


def pytest_collection_finish() -> None:
    """Look for garbage among what tests make, not among what was imported for them: compilations look several times."""
    gc.freeze()


@pytest.fixture(autouse=True)
def frozen_imports() -> Iterator[None]:
    """Do the same with what a test is the first to import."""
    count = len(sys.modules)
    yield
    if len(sys.modules) > count + MANY_MODULES:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def few_samples() -> Iterator[None]:
    """Compilations compare their graphs with their programs on an eighth of the samples, unless a test says more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcgraph.export.check.parity.SAMPLES", parity.SAMPLES // 8)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_converged_steps() -> Iterator[None]:
    """The reference that evaluations converge to takes as many steps as those of tests, which are few, call for."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("evaluate", "settings"):
            patch.setattr(f"qcgraph.evaluation.{module}.CONVERGED_STEPS", CONVERGED_STEPS)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_target_trajectories() -> Iterator[None]:
    """Solvers are fitted to few trajectories, unless a test says how many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcgraph.pipeline.calibration_budget.TARGET_LIMITS", (2, 8))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_refinement() -> Iterator[None]:
    """Coefficients of solvers are fitted in the order of the steps alone, unless a test asks for `refinement`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcgraph.passes.solver.plan_solver.EFFECTS", 0.0)
        yield


@pytest.fixture
def refinement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients of solvers are refined together, as they are in a compilation."""
    monkeypatch.setattr("qcgraph.passes.solver.plan_solver.EFFECTS", 0.5)


@pytest.fixture(scope="session", autouse=True)
def no_comparison() -> Iterator[None]:
    """Compilations are not compared with plain solvers, which samples hundreds of steps, unless a test says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcgraph.compiler.verdict.MACS", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_kept_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Evaluations keep converged references for the tests of this run alone."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcgraph.evaluation.kept.kept_folder", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """The exporter's table of translations is made once: it makes it anew for every graph, in about half a second."""
    made = ONNXRegistry.from_torchlib
    tables: dict[object, ONNXRegistry] = {}

    def copied(*options: object, **named: object) -> ONNXRegistry:
        key = (options, *sorted(named.items()))
        if key not in tables:
            tables[key] = made(*options, **named)
        table = copy(tables[key])
        table.functions = {target: list(translations) for target, translations in table.functions.items()}
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_captures() -> Iterator[None]:
    """Compilations of one model share its capture, which takes a second; tests of `capture` call it themselves."""
    known: dict[str, Program] = {}

    def shared(module: torch.nn.Module, spec: ModelSpec, input_names: tuple[str, ...]) -> Program:
        is_changed = any(
            part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules()
        )
        if type(module) is not DiT or is_changed:
            return capture(module, spec, input_names)
        weights = [(name, tensor_digest(tensor)) for name, tensor in module.state_dict().items()]
        key = repr((module, module.config, spec, input_names, weights))
        if key not in known:
            program = capture(module, spec, input_names)
            own = {name: tensor.clone() for name, tensor in program.constants.items()}
            known[key] = replace(program, constants=own)  # whoever writes to the weights of the module changes no other
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for place in CAPTURING:
            patch.setattr(place, shared)
        yield


@pytest.fixture
def own_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every compilation captures its model, as it does outside of tests."""
    for place in CAPTURING:
        monkeypatch.setattr(place, capture)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """PyTorch has as many threads after a test as before it: commands set them for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    """A random DiT of two blocks and 16 tokens that also predicts a sigma."""
    config = DiTConfig(input_size=8, patch_size=2, channels=2, width=32, depth=2, heads=2, class_count=5)
    module = DiT(config)
    initialize_random(module, torch.Generator().manual_seed(0))
    spec = ModelSpec.class_conditional("tiny", (2, 8, 8), 5, 5, output_channels=4)
    return LoadedModel(module.eval().requires_grad_(False), spec, ("x", "t", "y"))


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of the six blocks of the embedded model, as a folder: for what does not depend on its pictures."""
    folder = tmp_path_factory.mktemp("models") / "small-digits"
    folder.mkdir()
    card = json.loads((DIGITS_FOLDER / CARD_FILE).read_text("utf-8"))
    card["name"], card["config"]["depth"] = folder.name, SMALL_DEPTH
    (folder / CARD_FILE).write_text(json.dumps(card))
    (folder / CLASSIFIER_FILE).write_bytes((DIGITS_FOLDER / CLASSIFIER_FILE).read_bytes())
    weights = load_file(DIGITS_FOLDER / WEIGHTS_FILE)
    left_out = tuple(f"blocks.{index}." for index in range(SMALL_DEPTH, 6))
    save_file({name: value for name, value in weights.items() if not name.startswith(left_out)}, folder / WEIGHTS_FILE)
    return folder


@pytest.fixture(scope="session")
def captured(tiny_model: LoadedModel) -> Program:
    """The tiny denoiser as captured, with a plan of nine DDIM steps at guidance 1.5."""
    program = capture(tiny_model.module, tiny_model.spec, tiny_model.input_names)
    plan = make_step_plan("ddim", STEPS, 1.5, tiny_model.spec.noise_schedule, program.constants_digest)
    return program.with_facts(plan)


@pytest.fixture(scope="session")
def run() -> Callable[[str, Program], Program]:
    """Run a pipeline given as text."""
    return lambda text, program: Pipeline.parse(text).run(program)


@pytest.fixture(scope="session")
def cached(captured: Program, run: Callable[[str, Program], Program]) -> Program:
    """The tiny denoiser with a cache over all blocks, every third step computing."""
    return run("plan-cache{interval=3},insert-cache", captured)


@pytest.fixture(scope="session")
def sharpened() -> Callable[[Program], Program]:
    """Makes the queries of a program that is not quantized six times as long, so that some probabilities are large."""

    def sharpen(program: Program) -> Program:
        constants = dict(program.constants)
        for name in [name for name in constants if name.endswith("attn.qkv.weight")]:
            weight = constants[name].clone()
            weight[: len(weight) // 3] *= 6
            constants[name] = weight
        return replace(program, constants=constants)

    return sharpen


@pytest.fixture(scope="session")
def eager_runner() -> type[EagerRunner]:
    """Makes a sampling backend of a loaded model."""
    return EagerRunner


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``golden/NAME.txt``, or write it there under ``--regenerate-golden``."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--regenerate-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
        assert path.is_file(), f"no golden text {path.name}: run pytest --regenerate-golden and read what it wrote"
        expected = path.read_text("utf-8")
        difference = "\n".join(
            difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now", lineterm="")
        )
        assert text == expected, difference

    return compare


@pytest.fixture
def golden_diff(golden: Callable[[str, str], None]) -> Callable[[str, Program, Program], None]:
    """Compare what a pass changed in the program's text with ``golden/PASS.txt``."""

    def compare(name: str, before: Program, after: Program) -> None:
        lines = difflib.unified_diff(
            before.text.splitlines(), after.text.splitlines(), "before", "after", "", "", 1, ""
        )
        golden(name, "\n".join(lines) + "\n")

    return compare
