"""What was loaded stays what it was, whatever becomes of the bundle's folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcgraph
from qcgraph.bundle import Bundle, write_plan, writing
from qcgraph.bundle.watch import reading
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.onnx.emit import tensor_places
from qcgraph.export.run.open import runner_of
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.recipe import Recipe
from qcgraph.sampling.denoiser import Denoiser
from qcgraph.sampling.runner import Array

WEIGHTS, CHANGED = "weights.safetensors", "blocks.1.mlp.fc2.weight"
BACKENDS = ["onnxruntime", "torch"]
Write = Callable[..., Path]


@pytest.fixture
def write(unquantized: Any, tmp_path: Path) -> Write:
    """Writes a bundle, or replaces it by one with other weights, as a compilation does."""

    def written(*, other: bool = False) -> Path:
        path, facts = tmp_path / "bundle", unquantized.program.facts
        with writing(path, model="tiny", target="onnxruntime-cpu", force=other) as folder:
            write_plan(folder, facts[ModelSpec], facts[StepPlan], unquantized.interfaces)
            (folder / "recipe.lock.toml").write_text(Recipe().to_toml())
            for name in (WEIGHTS, "program.json", *(f"{variant}.onnx" for variant in unquantized.interfaces)):
                shutil.copyfile(unquantized.folder / name, folder / name)
            if other:
                change_weights(folder / WEIGHTS)
        return path

    return written


def change_weights(path: Path) -> None:
    """Doubles a weight of the last block, in place."""
    offset, size = tensor_places(path)[CHANGED]
    with path.open("r+b") as stream:
        stream.seek(offset)
        values = np.frombuffer(stream.read(size), dtype=np.float32)
        stream.seek(offset)
        stream.write((values * 2).tobytes())


def walk(denoiser: Denoiser, steps: slice = slice(None)) -> list[Array]:
    latent = np.random.default_rng(0).standard_normal((2, 2, 8, 8), dtype=np.float32)
    return [denoiser(latent, timestep, [0, 3]).sample for timestep in denoiser.plan.timesteps[steps]]


def same(one: list[Array], other: list[Array]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bundle_that_is_replaced_after_it_was_loaded(write: Write, backend: str) -> None:
    """Before the first step that reuses, whose graph was not needed up to then."""
    path = write()
    expected = walk(qcgraph.load(path, backend=backend, threads=1))
    denoiser = qcgraph.load(path, backend=backend, threads=1)
    begun = walk(denoiser, slice(0, 1))
    write(other=True)
    assert same(begun + walk(denoiser, slice(1, None)), expected)
    assert same(walk(denoiser), expected)
    assert not same(walk(qcgraph.load(path, backend=backend, threads=1)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bundle_that_is_deleted_after_it_was_loaded(write: Write, backend: str) -> None:
    path = write()
    expected = walk(qcgraph.load(path, backend=backend, threads=1))
    denoiser = qcgraph.load(path, backend=backend, threads=1)
    shutil.rmtree(path)
    assert same(walk(denoiser), expected)


def test_weights_that_are_written_to_in_place_are_refused(write: Write) -> None:
    """ONNX Runtime maps them into memory: results would change, or the process die of a file that is shorter."""
    path = write() / WEIGHTS
    denoiser = qcgraph.load(path.parent, backend="onnxruntime", threads=1)
    expected, content = walk(denoiser), path.read_bytes()
    for damage in (change_weights, lambda path: os.truncate(path, 100)):
        damage(path)
        with pytest.raises(BundleError, match="was written to after the bundle was loaded") as caught:
            walk(denoiser)
        assert "load the bundle again" in str(caught.value.hint)
        path.write_bytes(content)
        assert same(walk(denoiser), expected)
    path.write_bytes(content)  # the same again
    assert same(walk(denoiser), expected)


def test_torch_reads_weights_once(write: Write) -> None:
    path = write() / WEIGHTS
    denoiser = qcgraph.load(path.parent, backend="torch", threads=1)
    expected = walk(denoiser)
    change_weights(path)
    assert same(walk(denoiser), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bundle_that_is_replaced_while_it_is_loaded(write: Write, backend: str) -> None:
    bundle = Bundle.open(write())
    assert bundle.plan
    write(other=True)
    with pytest.raises(BundleError, match=r"replaced.* while it was (loaded|read)"):
        runner_of(bundle, backend, 1)
    shutil.rmtree(bundle.path)
    with pytest.raises(BundleError, match=r"while it was (loaded|read)"):
        runner_of(bundle, backend, 1)


def test_what_is_read_of_a_bundle_is_of_one(write: Write) -> None:
    bundle = Bundle.open(write())
    with reading(bundle, [WEIGHTS, "of no bundle"], done="verified") as files:
        assert list(files) == [WEIGHTS]
    with pytest.raises(BundleError, match="while it was verified"), reading(bundle, done="verified"):
        write(other=True)
    bundle = Bundle.open(bundle.path)
    with pytest.raises(BundleError, match=r"while it was (loaded|read)"), reading(bundle, [WEIGHTS]):
        change_weights(bundle.path / WEIGHTS)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "two", 10**400, 10**5000], ids=lambda value: str(type(value)))
def test_numbers_of_threads_that_are_refused(write: Write, threads: Any) -> None:
    with pytest.raises(UsageError, match="threads") as caught:
        qcgraph.load(write(), threads=threads)
    assert "1 to 1024" in str(caught.value.hint)


def test_what_load_refuses(write: Write) -> None:
    path = write()
    for wrong in (None, 3, Bundle.open(path), "a\0b", ["out"]):
        with pytest.raises(UsageError, match="is not the path of a bundle") as caught:
            qcgraph.load(wrong)  # type: ignore[arg-type]
        assert caught.value.hint
    with pytest.raises(UsageError, match="unknown backend 5"):
        qcgraph.load(path, backend=5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="own_updates is 'no'"):
        qcgraph.load(path, own_updates="no")  # type: ignore[arg-type]
