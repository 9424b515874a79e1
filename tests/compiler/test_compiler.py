"""Compiling for real: the trained digits, end to end, through the command line, on both backends."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import qcgraph
from qcgraph.bundle import Bundle
from qcgraph.cli import run
from qcgraph.compiler.compilation import compile_model, verify_bundle
from qcgraph.errors import UsageError, VerificationError
from qcgraph.evaluation.ablation import without_compensation
from qcgraph.evaluation.settings import Subject
from qcgraph.evaluation.solvers import sample_with
from qcgraph.export.run.open import runner_of
from qcgraph.export.targets import target_of
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import load_program
from qcgraph.models import LoadedModel, load_model
from qcgraph.models.classifier import load_classifier
from qcgraph.models.dit import DiT, initialize_random
from qcgraph.models.eager import EagerRunner
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import PREDICTION_NAME, ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe
from qcgraph.sampling.calibration import LatentStatistics
from qcgraph.sampling.conditions import in_turn, of_labels
from qcgraph.sampling.loop import TakenStep, sample
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Runner

OPTIONS = "--steps 12 --guidance 1.5 --bits w8a8 --groups 4 --cache interval=3 --compensate vc --target onnxruntime-cpu"
JUDGING = "--samples 16 --seeds 1 --metrics psnr --no-sites"
LABELS = list(range(10)) * 2


class Scaled(torch.nn.Module):
    """A denoiser without matrix products, and without conditions."""

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return latent * torch.sigmoid(timestep / 1000)[:, None, None, None]


FEW: dict[str, dict[str, int]] = {
    "calibration": {"trajectories": 2},
    "quantization": {"groups": 2},
}  # for what does not depend on how well it is calibrated


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """digits as the README compiles it, with fewer steps and fewer trajectories to calibrate on."""
    folder = tmp_path_factory.mktemp("compiled")
    recipe, path = folder / "few.toml", folder / "digits"
    recipe.write_text("[calibration]\ntrajectories = 8\n")
    assert run(["compile", "digits", "-o", str(path), "--recipe", str(recipe), *OPTIONS.split()]) == 0
    return Bundle.open(path)


@pytest.fixture(scope="module")
def one_block(tiny_model: LoadedModel) -> LoadedModel:
    """The tiny model with a single block, for what depends on no graph in particular."""
    module = DiT(replace(tiny_model.module.config, depth=1))
    initialize_random(module, torch.Generator().manual_seed(0))
    return replace(tiny_model, module=module.eval().requires_grad_(False))


def deviations(runner: Runner, plan: StepPlan, spec: ModelSpec) -> np.ndarray:
    """The standard deviation of the latents after each step, [steps, channels]."""
    statistics = LatentStatistics(len(plan), spec.latent_shape[0])

    def observe(taken: TakenStep) -> None:
        statistics.add(taken.index, taken.after)

    sample(runner, plan, spec, LABELS, 5, observe=observe)
    return statistics.deviations


def draw(bundle: Bundle, backend: str, seed: int = 5) -> np.ndarray:
    return sample(runner_of(bundle, backend), bundle.plan, bundle.spec, LABELS, seed)


@pytest.fixture(scope="module")
def exact(eager_runner: Callable[[LoadedModel], Runner]) -> np.ndarray:
    """Full precision digits, twelve steps, without any of qcgraph's graphs."""
    model = load_model("digits")
    plan = make_step_plan("ddim", 12, 1.5, model.spec.noise_schedule, "")
    return sample(eager_runner(model), plan, model.spec, LABELS, 5)


@pytest.mark.slow
def test_a_bundle_is_whole(bundle: Bundle) -> None:
    files = set(bundle.manifest.files)
    assert {"full.onnx", "reuse.onnx", "weights.safetensors", "program.json", "report.json"} <= files
    assert {"ir/000_capture.txt", "ir/010_insert-qdq.txt", "ir/010_insert-qdq.diff"} <= files
    assert "scheduler/scheduler_config.json" in files
    assert bundle.plan.variants == ("full", "reuse")
    assert bundle.plan.group_count == 4
    assert not any(name.endswith((".pkl", ".pickle", ".pt")) for name in files)


@pytest.mark.slow
def test_the_report_tells_what_happened(bundle: Bundle) -> None:
    report = json.loads(bundle.file("report.json").read_text())
    assert report["quantized_sites"] == 24
    assert report["variants"]["full"]["steps"] == 4
    assert 0.3 < report["mac_ratio"] < 0.4
    assert report["cached_range_change"]["relative"] > 0
    assert 0 < report["largest_variance_drift"] < 0.2
    assert [check["passed"] for check in report["checks"]] == [True] * 8
    assert {"load", "capture", "export", "verify"} <= set(report["stages"])
    parts = [*report["stages"].values(), *(row["seconds"] for row in report["passes"])]
    assert 0 < sum(parts) < report["seconds"] + 0.1  # each is rounded
    reasons = [refusal["reason"] for row in report["passes"] for refusal in row["refusals"]]
    assert any("adaLN" in reason for reason in reasons)


@pytest.mark.slow
@pytest.mark.usefixtures("own_captures")
def test_weights_are_forgotten_when_others_stand_for_them(
    small_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a large model would need memory for weights that nothing reads, in passes and in an export that need it."""
    loads: list[dict[str, StorageWeakRef]] = []
    forgotten: dict[str, list[set[str]]] = {}

    def loading(name: str) -> LoadedModel:
        model = load_model(name)
        named = model.module.named_parameters()
        loads.append({name: StorageWeakRef(value.untyped_storage()) for name, value in named})
        return model

    class AtExport(Progress):
        def stage(self, name: str) -> None:
            forgotten[name] = [{name for name, storage in load.items() if storage.expired()} for load in loads]
            if name == "export":
                raise InterruptedError

    monkeypatch.setattr("qcgraph.compiler.compilation.load_model", loading)
    monkeypatch.setattr("qcgraph.compiler.compilation.HELD_BYTES", 0)  # as if it were a large model
    recipe = Recipe.model_validate(FEW).override(steps=3, bits="w8a8", cache="interval=3")
    with pytest.raises(InterruptedError):
        compile_model(str(small_digits), recipe, tmp_path / "digits", progress=AtExport())
    linears = {name for name in loads[0] if re.fullmatch(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight", name)}
    equalized = {name for name in linears if "fc2" not in name}
    assert (len(linears), len(equalized)) == (8, 6)
    assert forgotten["plan-equalization"] == forgotten["equalize"] == [set()]
    for name in ("plan-cache", "insert-qdq"):
        assert forgotten[name][0] & linears == equalized
    first, again = forgotten["export"]
    assert linears <= first
    assert "pos_embed" not in first
    assert again == set(loads[1])  # what was loaded to measure cached edges


@pytest.mark.slow
def test_a_model_that_changes_meanwhile_is_refused(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded again to measure cached edges, which are those of the model that was compiled."""
    seeds = iter(range(2))

    def loading(_: str) -> LoadedModel:
        module = copy.deepcopy(tiny_model.module)
        initialize_random(module, torch.Generator().manual_seed(next(seeds)))
        return replace(tiny_model, module=module)

    monkeypatch.setattr("qcgraph.compiler.compilation.load_model", loading)
    monkeypatch.setattr("qcgraph.compiler.compilation.HELD_BYTES", 0)  # as if it were a large model
    recipe = Recipe.model_validate(FEW).override(steps=3, bits="w8a8", cache="interval=3")
    with pytest.raises(UsageError, match="other weights than when it was loaded first") as caught:
        compile_model("somewhere:factory", recipe, tmp_path / "tiny")
    assert "without a seed" in str(caught.value)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.slow
def test_a_small_model_is_loaded_once(tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def loading(name: str) -> LoadedModel:
        loads.append(name)
        return tiny_model

    monkeypatch.setattr("qcgraph.compiler.compilation.load_model", loading)
    recipe = Recipe.model_validate(FEW).override(steps=3, bits="w8a8", cache="interval=3")
    made = []
    for name, held in (("kept", 2**30), ("loaded-again", 0)):
        monkeypatch.setattr("qcgraph.compiler.compilation.HELD_BYTES", held)
        compiled = compile_model(name, recipe.override(target="torch"), tmp_path / name).bundle
        assert compiled is not None
        made.append({file: entry.sha256 for file, entry in compiled.manifest.files.items() if file != "report.json"})
    assert loads == ["kept", "loaded-again", "loaded-again"]
    assert made[0] == made[1]


@pytest.mark.slow
def test_both_backends_draw_the_same_digits(bundle: Bundle) -> None:
    """Within what the quantized network makes of a difference of one part in a million, measured here."""
    reference, other = draw(bundle, "torch"), draw(bundle, "onnxruntime")
    program = load_program(bundle.path)
    constants = dict(program.constants)
    constants["pos_embed"] = constants["pos_embed"] * (1 + 1e-6)
    nearby = sample(TorchRunner(replace(program, constants=constants)), bundle.plan, bundle.spec, LABELS, 5)
    floor = np.linalg.norm(nearby - reference)
    assert np.linalg.norm(other - reference) < 3 * floor
    assert np.linalg.norm(other - reference) / np.linalg.norm(reference) < 0.05


@pytest.mark.slow
def test_the_samples_are_digits(bundle: Bundle) -> None:
    images = torch.from_numpy(draw(bundle, "onnxruntime"))
    assert load_classifier().accuracy(images, torch.tensor(LABELS)) >= 0.9


@pytest.mark.slow
def test_the_samples_are_close_to_full_precision(bundle: Bundle, exact: np.ndarray) -> None:
    ours = draw(bundle, "onnxruntime")
    error = float(np.mean((np.clip(exact, -1, 1) - np.clip(ours, -1, 1)) ** 2))
    assert 10 * np.log10(4 / error) > 20  # dB; four computing steps of twelve


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddim", pytest.param("ddpm", marks=pytest.mark.slow)])
def test_neutral_settings_are_the_captured_model_bit_for_bit(tmp_path: Path, scheduler: str, exact: np.ndarray) -> None:
    recipe = Recipe().override(bits="off", cache="interval=1", compensate="off", steps=12, scheduler=scheduler)
    bundle = qcgraph.compile("digits", recipe.override(target="torch"), output=tmp_path / "neutral")
    if scheduler == "ddim":
        assert np.array_equal(draw(bundle, "torch"), exact)
    assert bundle.plan.variants == ("main",)
    with pytest.raises(Exception, match=r"has no main.onnx: it was compiled for target 'torch'"):
        runner_of(bundle, "onnxruntime")


@pytest.fixture(scope="module")
def unquantized(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two blocks of digits with a cache and compensation, in float32."""
    recipe = Recipe.model_validate(FEW).override(bits="off", cache="interval=3", compensate="vc", steps=6)
    return qcgraph.compile(str(small_digits), recipe, output=tmp_path_factory.mktemp("compiled") / "float")


@pytest.mark.slow
def test_unquantized_graphs_are_exact_to_float32(unquantized: Bundle) -> None:
    checks = {(check.variant, check.name): check for check in verify_bundle(unquantized)}
    for variant in ("full", "reuse"):
        assert checks[variant, "parity of noise_prediction"].value <= 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("own_captures")
def test_compilation_is_deterministic(tiny_model: LoadedModel, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(FEW).override(steps=4, cache="interval=2", compensate="vc")
    files = [qcgraph.compile(tiny_model, recipe, output=tmp_path / name).manifest.files for name in ("one", "two")]
    same = ("weights.safetensors", "plan.json", "program.json", "full.onnx", "reuse.onnx")
    assert [files[0][name].sha256 for name in same] == [files[1][name].sha256 for name in same]


@pytest.mark.slow
def test_a_bundle_can_be_moved_and_verified(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "elsewhere")
    checks = verify_bundle(Bundle.open(tmp_path / "elsewhere"))
    assert len(checks) == 8
    assert all(check.passed for check in checks)


@pytest.mark.slow
def test_the_loaded_denoiser_runs_in_a_diffusers_loop(unquantized: Bundle) -> None:
    """A host that knows diffusers only: its scheduler, its guidance, our denoiser; the images are those of `sample`."""
    from diffusers import DDIMScheduler

    denoiser = qcgraph.load(unquantized.path)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(6)
    latent = torch.from_numpy(Noise(5, range(20), (1, 8, 8)).initial())
    labels = torch.tensor(LABELS + [10] * 20)
    for timestep in scheduler.timesteps:
        prediction = denoiser(torch.cat([latent, latent]), timestep=timestep, class_labels=labels).sample
        conditional, null = prediction.chunk(2)
        latent = scheduler.step(null + 1.5 * (conditional - null), timestep, latent).prev_sample
    np.testing.assert_allclose(latent.numpy(), draw(unquantized, "onnxruntime"), atol=1e-4)


SAMPLING = (
    "import sys; from qcgraph.cli import run; code = run(sys.argv[1:]); print(sorted(sys.modules)); sys.exit(code)"
)


@pytest.mark.slow
def test_sampling_imports_neither_torch_nor_diffusers(bundle: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAMPLING, "sample", str(bundle.path), "-n", "10", "-o", str(tmp_path / "grid.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1]
    assert "'onnxruntime'" in modules
    assert not any(f"'{name}'" in modules for name in ("torch", "diffusers", "onnx"))
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "25"], "the plan was made for steps = 12, not 25"),
        (["--scheduler", "ddpm"], "the plan was made for scheduler = ddim"),
        (["--guidance", "4"], "the plan was made for guidance = 1.5"),
        (["-n", "0"], "at least one"),
        (["--class", "10"], "class 10 is out of range"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_a_bundle_refuses_what_it_was_not_made_for(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(["sample", str(bundle.path), "-o", str(tmp_path / "grid.png"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "\n\nhint: " in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_inspect_and_diff_of_a_compiled_bundle(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(bundle.path)
    assert run(["inspect", path, "--after", "insert-qdq", "--node", "blocks.0.*"]) == 0
    text = capsys.readouterr().out
    assert "; blocks.0.attn.qkv" in text
    assert "insert-qdq, from linear" in text
    assert "blocks.1" not in text
    assert run(["diff", path, "05", "06"]) == 0
    assert "+timestep groups 4" in capsys.readouterr().out


def nan_model() -> LoadedModel:
    model = load_model("digits")
    module = type(model.module)(model.module.config)
    module.load_state_dict(model.module.state_dict())
    module.eval().requires_grad_(False)
    module.blocks[2].mlp.fc1.weight[3, 4] = float("nan")
    return replace(model, module=module)


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], LoadedModel]], str]:
    """Make a model reachable as ``package.module:factory``."""

    def register(make: Callable[[], LoadedModel]) -> str:
        module = type(sys)("made_for_a_test")
        module.factory = make  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "made_for_a_test", module)
        return "made_for_a_test:factory"

    return register


def test_nan_weights_are_refused(
    factory: Callable[[Callable[[], LoadedModel]], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", factory(nan_model), "-o", str(tmp_path / "out"), "--steps", "4"]) == 2
    error = capsys.readouterr().err
    assert "blocks.2.mlp.fc1.weight" in error
    assert "hint: " in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_your_own_model(
    factory: Callable[[Callable[[], LoadedModel]], str], one_block: LoadedModel, tmp_path: Path
) -> None:
    name = factory(lambda: one_block)
    (tmp_path / "few.toml").write_text("[calibration]\ntrajectories = 2\n")
    options = ["--recipe", str(tmp_path / "few.toml"), "--steps", "4", "--cache", "interval=2"]
    assert run(["compile", name, "-o", str(tmp_path / "out"), *options]) == 0
    assert Bundle.open(tmp_path / "out").spec.output_channels == 4


def spoil(variant: str) -> Callable[..., None]:
    """An exporter that shifts the prediction of one variant by a hundredth, as a wrong translation of an op would."""
    from qcgraph.export.onnx.emit import emit_onnx

    def emit(program: Program, folder: Path, *rest: object, **options: object) -> None:
        emit_onnx(program, folder, *rest, **options)  # type: ignore[arg-type]
        model = onnx.load(str(folder / f"{variant}.onnx"), load_external_data=False)
        (maker,) = (node for node in model.graph.node if PREDICTION_NAME in node.output)
        maker.output[list(maker.output).index(PREDICTION_NAME)] = "unshifted"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.01), "shift"))
        model.graph.node.append(onnx.helper.make_node("Add", ["unshifted", "shift"], [PREDICTION_NAME]))
        onnx.save(model, str(folder / f"{variant}.onnx"))

    return emit


@pytest.mark.slow
def test_a_bundle_that_fails_its_checks_is_kept_beside(
    one_block: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "out", Recipe().override(bits="off", steps=2)
    qcgraph.compile(one_block, recipe, output=output)
    before = (output / "manifest.json").read_bytes()
    monkeypatch.setattr("qcgraph.export.onnx.emit.emit_onnx", spoil("main"))
    for _ in range(2):  # the second takes the place of what the first left
        with pytest.raises(VerificationError, match="1 of 2 checks of the exported graphs failed\n") as caught:
            compile_model(one_block, recipe, output, force=True)
    assert caught.value.exit_code == 1
    assert re.search(
        r"\nparity of noise_prediction of main: .*, at most .* expected: relative L2", caught.value.message
    )
    assert str(tmp_path / "out.rejected") in str(caught.value.hint)
    assert (output / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.rejected"]
    rejected = Bundle.open(tmp_path / "out.rejected")
    assert rejected.manifest.overrides == ("failed-checks",)
    assert [check.passed for check in verify_bundle(rejected)] == [True, False]
    monkeypatch.undo()
    compile_model(one_block, recipe, output, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_what_was_rejected_never_replaces_anybodys_files(
    one_block: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.rejected").mkdir()
    (tmp_path / "out.rejected" / "thesis.tex").touch()
    monkeypatch.setattr("qcgraph.export.onnx.emit.emit_onnx", spoil("main"))
    with pytest.raises(VerificationError, match="checks of the exported graphs failed") as caught:
        compile_model(one_block, Recipe().override(bits="off", steps=2), tmp_path / "out")
    assert "is not kept, because" in str(caught.value.hint)
    assert [path.name for path in tmp_path.rglob("*")] == ["out.rejected", "thesis.tex"]


@pytest.mark.parametrize("options", [{"stop_after": "insert-qdd"}, {"print_after": ("calibrat",)}])
def test_unknown_pass_names(tiny_model: LoadedModel, tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="no pass") as caught:
        compile_model(tiny_model, Recipe(), tmp_path / "out", **options)  # type: ignore[arg-type]
    assert "did you mean" in str(caught.value.hint)


@pytest.mark.slow
def test_a_multistep_solver(small_digits: Path, tmp_path: Path) -> None:
    """Compiled, judged and drawn without diffusers: close to what diffusers draws with the model itself.

    Compensation brings the spread of the latents closer to full precision, from noise that it was not fitted to.
    """
    options = ["--scheduler", "dpmsolver++", "--steps", "12", "--bits", "w8a8", "--cache", "interval=2"]
    (tmp_path / "few.toml").write_text("[calibration]\ntrajectories = 8\n")
    options += ["--recipe", str(tmp_path / "few.toml"), "--compensate", "vc"]
    assert run(["compile", str(small_digits), "-o", str(tmp_path / "digits"), *options]) == 0
    assert run(["eval", str(tmp_path / "digits"), *JUDGING.split()]) == 0
    bundle, model = Bundle.open(tmp_path / "digits"), load_model(str(small_digits))
    expected = sample_with("dpmsolver++", 12, 1.5, EagerRunner(model), model.spec, of_labels(LABELS, model.spec), 5)
    drawn = draw(bundle, "onnxruntime")
    assert np.linalg.norm(drawn - expected) / np.linalg.norm(expected) < 0.1
    program = load_program(bundle.path)
    assert np.linalg.norm(draw(bundle, "torch") - drawn) / np.linalg.norm(drawn) < 0.01
    exact = deviations(EagerRunner(model), bundle.plan, model.spec)
    with_it, without = (
        np.abs(deviations(TorchRunner(run), bundle.plan, bundle.spec) / exact - 1).mean()
        for run in (program, without_compensation(program))
    )
    assert with_it < 0.5 * without


CACHES = {
    "budget": ({"schedule": "budget=0.65"}, "off", {"full", "reuse"}),
    "dps-dec": ({"schedule": "dps=3", "forecast": "dec"}, "off", {"full", "reuse"}),
    "branches": ({"schedule": "budget=0.4", "what": "branches", "cost": "macs"}, "w8a8", {"full", "reuse"}),
    "two-modes": ({"schedule": "budget=0.7", "blocks": "0..0+1..1", "cost": "macs"}, "w8a8", None),
    "whole-budget": ({"schedule": "budget=1.0"}, "w8a8", {"main"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "bits", "variants"), CACHES.values(), ids=CACHES)
def test_every_way_to_cache(
    tiny_model: LoadedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cache: dict[str, str],
    bits: str,
    variants: set[str] | None,
) -> None:
    """Compiled, verified again from the bundle, drawn by both backends, and read by the command line."""
    recipe = Recipe.model_validate({"cache": cache, **FEW}).override(steps=6, bits=bits)
    bundle = compile_model(tiny_model, recipe, tmp_path / "tiny").bundle
    assert bundle is not None
    assert set(bundle.interfaces) == (variants or set(bundle.plan.variants))
    assert all(check.passed for check in verify_bundle(bundle))
    drawn = [
        sample(runner_of(bundle, backend), bundle.plan, bundle.spec, [0, 1, 2, 3], 5)
        for backend in ("torch", "onnxruntime")
    ]
    assert np.linalg.norm(drawn[1] - drawn[0]) / np.linalg.norm(drawn[0]) < 0.05
    report = json.loads(bundle.file("report.json").read_text())
    assert run(["inspect", str(bundle.path)]) == 0
    text = capsys.readouterr().out
    if variants == {"main"}:
        assert report["cache"] is None
        return
    assert report["cache"]["schedule"] == bundle.plan.schedule()
    if cache["schedule"].startswith("budget="):
        spent = report["cache"]["planned"]["spent"]
        assert spent <= float(cache["schedule"].removeprefix("budget="))
        assert f"budget     {spent:.1%} of computing every step" in text
    assert report["cache"]["forecast"]["error"] < report["cache"]["forecast"]["reuse_error"]
    assert f"forecast   {recipe.forecast}, off by" in text


@pytest.mark.slow
def test_a_recipes_own_pipeline(tiny_model: LoadedModel, tmp_path: Path) -> None:
    recipe = Recipe.from_toml(
        '[sampling]\nsteps = 4\n[pipeline]\npasses = "plan-cache{interval=2 blocks=1..1},insert-cache"'
    )
    bundle = qcgraph.compile(tiny_model, recipe, output=tmp_path / "out")
    passes = ["plan-cache{interval=2 blocks=1..1}", "insert-cache", "lower-linear"]  # the last is the target's
    assert [record["text"] for record in bundle.history] == passes
    assert bundle.plan.variants == ("full", "reuse")


def test_guidance_needs_a_null_value(tiny_model: LoadedModel) -> None:
    """Before anything is captured: without a null value both halves would be the same."""
    (label,) = tiny_model.spec.conditions
    spec = replace(tiny_model.spec, conditions=(replace(label, null=None),))
    model = replace(tiny_model, spec=spec)
    with pytest.raises(UsageError, match=r"guidance 1\.5 needs an unconditional half") as caught:
        compile_model(model, Recipe().override(guidance=1.5, bits="off", steps=2), None, dry_run=True)
    assert "--guidance 1" in str(caught.value.hint)
    assert compile_model(model, Recipe().override(guidance=1.0, bits="off", steps=2), None, dry_run=True).bundle is None


@pytest.mark.slow
def test_a_model_without_products_is_compiled_and_judged(tmp_path: Path) -> None:
    model = LoadedModel(Scaled().eval(), ModelSpec("scaled", (1, 4, 4), 1, ()), ("latent", "timestep"))
    recipe = Recipe().override(steps=4, guidance=1, cache="off")
    bundle = qcgraph.compile(model, recipe, output=tmp_path / "out")
    assert bundle.report is not None
    assert bundle.report.mac_ratio == 1.0
    program = load_program(bundle.path)
    runner = runner_of(bundle)
    subject = Subject(model, program, program, bundle.plan, runner, bundle.path, target_of(bundle))
    assert subject.cost(bundle.plan) == 4.0
    drawn = sample(runner, bundle.plan, bundle.spec, in_turn(3, bundle.spec), seed=0)
    expected = sample(TorchRunner(program), bundle.plan, bundle.spec, in_turn(3, bundle.spec), seed=0)
    np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=1e-6)
