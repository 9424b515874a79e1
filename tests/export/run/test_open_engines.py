"""Engines that are refused: of another machine, version or bundle, or damaged; and what there is no GPU for."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch

from qcgraph.bundle import Bundle, write_plan, writing
from qcgraph.bundle.engines import Batch, Engine, engine_files, source_of, write_record
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.run import open_engines
from qcgraph.export.run.open import runner_of
from qcgraph.export.run.open_engines import choose_engines, read_engine
from qcgraph.export.tensorrt import device
from qcgraph.plan.roles import COMPUTES, TensorRole
from qcgraph.plan.spec import Interface, ModelSpec, TensorSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update
from qcgraph.recipe import Recipe

PLAN = StepPlan(
    Fingerprint("0123456789abcdef", "ddim", 1, 1.5), (Step(1.0, Update(1.0, 0.1), "full"),), {"full": COMPUTES}
)
LATENT = TensorSpec("latent", "f32", ("B", 1), TensorRole.STATE)
PREDICTION = TensorSpec("noise_prediction", "f32", ("B", 1), TensorRole.PREDICTION)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def engine(capability: str, variant: str = "full") -> Engine:
    name = f"{variant}.sm{capability.replace('.', '')}.engine"
    probed = {
        "steps": None,
        "quantized_gemms": None,
        "not_quantized": None,
        "fused_attention": None,
        "conditional_jumps": None,
    }
    return Engine(
        variant=variant,
        file=name,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        bytes=len(name),
        compute_capability=capability,
        batch=Batch(minimum=2, optimum=2, maximum=16),
        seconds=1.0,
        layers=1,
        **probed,
    )


def make_bundle(path: Path, model: str = "toy") -> Bundle:
    spec = ModelSpec.class_conditional(model, (1, 1, 1), 10, 10, 1)
    with writing(path, model=model, target="tensorrt-rtx") as folder:
        write_plan(folder, spec, PLAN, {"full": Interface((LATENT,), (PREDICTION,))})
        (folder / "recipe.lock.toml").write_text(Recipe().to_toml())
    return Bundle.open(path)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle with engines for two GPUs, which are none."""
    bundle = make_bundle(tmp_path / "bundle")
    folder = bundle.path / "engines"
    folder.mkdir()
    engines = (engine("8.9"), engine("12.0"))
    for each in engines:
        (folder / each.file).write_bytes(each.file.encode())
    write_record(folder, "tensorrt-rtx", "1.7.1", source_of(bundle), engines)
    return bundle


def test_the_engines_of_this_gpu_are_chosen(bundle: Bundle) -> None:
    chosen = choose_engines(bundle.path / "engines", bundle, "tensorrt-rtx", "1.7.1", "12.0")
    assert {variant: each.file for variant, each in chosen.items()} == {"full": "full.sm120.engine"}
    assert read_engine(bundle.path / "engines", chosen["full"]) == b"full.sm120.engine"


@pytest.mark.parametrize(
    ("here", "problem"),
    [
        (("tensorrt", "1.7.1", "8.9"), "they were built for tensorrt-rtx, not for tensorrt"),
        (("tensorrt-rtx", "1.8.0", "8.9"), "they were built with TensorRT-RTX 1.7.1, and 1.8.0 is installed"),
        (("tensorrt-rtx", "1.7.1", "9.0"), "they are for compute capability 8.9, 12.0, and this GPU has 9.0"),
    ],
)
def test_engines_that_do_not_run_here(bundle: Bundle, here: tuple[str, str, str], problem: str) -> None:
    with pytest.raises(BundleError, match=re.escape(problem)) as raised:
        choose_engines(bundle.path / "engines", bundle, *here)
    assert raised.value.exit_code == 2
    assert raised.value.hint == (
        f"qcgraph build {bundle.path} --target {here[0]} --compute-capability {here[2]} --force"
    )


def test_engines_of_another_bundle(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="they were built of another bundle: toy, tensorrt-rtx"):
        choose_engines(bundle.path / "engines", make_bundle(tmp_path / "b", "b"), "tensorrt-rtx", "1.7.1", "8.9")


def test_no_engines_or_none_of_a_variant(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there are no engines") as raised:
        choose_engines(tmp_path, bundle, "tensorrt-rtx", "1.7.1", "8.9")
    assert str(raised.value.hint).endswith("--target tensorrt-rtx --compute-capability 8.9")
    write_record(bundle.path / "engines", "tensorrt-rtx", "1.7.1", source_of(bundle), (engine("8.9", "reuse"),))
    with pytest.raises(BundleError, match="there is none of full"):
        choose_engines(bundle.path / "engines", bundle, "tensorrt-rtx", "1.7.1", "8.9")


def test_a_changed_engine(bundle: Bundle) -> None:
    folder = bundle.path / "engines"
    (folder / "full.sm89.engine").write_bytes(b"something else")
    with pytest.raises(BundleError, match=r"full\.sm89\.engine: is not the file that was built"):
        read_engine(folder, engine("8.9"))
    (folder / "full.sm89.engine").unlink()
    with pytest.raises(BundleError, match="the file is missing"):
        read_engine(folder, engine("8.9"))


def test_caches_belong_to_the_engines(bundle: Bundle) -> None:
    folder = bundle.path / "engines"
    for name in ("timing.cache", "runtime.sm89.cache"):
        (folder / name).touch()
    assert engine_files(folder) == {path.name for path in folder.iterdir()}
    (folder / "other.cache").touch()
    assert "other.cache" not in engine_files(folder)


def test_backends_that_are_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="4 threads have no effect on engines"):
        runner_of(bundle, "tensorrt-rtx", 4)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("qcgraph.export.tensorrt.provider.importlib.import_module", missing)
    with pytest.raises(UsageError, match="TensorRT is not installed\n\nhint: pip install tensorrt"):
        runner_of(bundle, "tensorrt")


@no_gpu
def test_without_a_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_engines, "load_provider", lambda _: object())
    with pytest.raises(UsageError, match=r"is built without CUDA|there is no CUDA device") as raised:
        runner_of(bundle, "tensorrt-rtx")
    assert "another backend" in str(raised.value.hint)


def test_memory_that_does_not_suffice() -> None:
    with (
        pytest.raises(UsageError, match="not enough device memory for full at a batch of 16: CUDA out of memory"),
        device.device_memory("full at a batch of 16"),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
