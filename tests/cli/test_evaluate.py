"""qcgraph eval and the gate of qcgraph compile, on blocks of digits: figures, seeded faults, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from qcgraph.cli import run

COMPILE = "--steps 20 --groups 3 --cache interval=2 --compensate vc --bits w8a8"
FEW = ("--samples", 16, "--metrics", "psnr,latent_error", "--threads", 1)
EQUAL_COST = ("fewer_steps", "solver", "fitted_solver")
ONE_SEED, QUICK = (*FEW, "--seeds", 1), (*FEW, "--seeds", 2)


@pytest.fixture(scope="module")
def bundle(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluated") / "digits"
    assert run(["compile", str(small_digits), "-o", str(path), *COMPILE.split()]) == 0
    return path


@pytest.fixture(scope="module")
def reference(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without graphs, which is judged sooner: for what the program and its plan decide alone."""
    path = tmp_path_factory.mktemp("evaluated") / "reference"
    assert run(["compile", str(small_digits), "-o", str(path), *COMPILE.split(), "--target", "torch"]) == 0
    return path


@pytest.fixture
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration on few trajectories: not for a bundle that is to have no faults."""
    path = tmp_path_factory.mktemp("recipe") / "few.toml"
    path.write_text("[calibration]\ntrajectories = 2\n")
    return path


def sign(path: Path) -> None:
    """Make the manifest agree with files that were changed."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def change_weights(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change tensors of a bundle in place; names, types and shapes stay, so graphs still find them."""
    tensors = load_file(path / "weights.safetensors")
    change(tensors)
    before = (path / "weights.safetensors").stat().st_size
    save_file(tensors, path / "weights.safetensors")
    assert (path / "weights.safetensors").stat().st_size == before
    sign(path)


@pytest.fixture
def broken(bundle: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(bundle, tmp_path / "broken"))


@pytest.fixture
def broken_reference(reference: Path, tmp_path: Path) -> Path:
    """A copy of the other one to break."""
    return Path(shutil.copytree(reference, tmp_path / "broken"))


@pytest.mark.slow
def test_a_sound_bundle(bundle: Path, qcgraph: Callable[..., Any], tmp_path: Path) -> None:
    done = qcgraph("eval", bundle, *QUICK, "--json", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["faults"] == []
    assert report["passed"]
    rows = {row["key"]: row for row in report["rows"]}
    assert list(rows) == ["full_precision", "quantization", "cache", "both", "compiled", *EQUAL_COST]
    value = {key: row["metrics"]["psnr"]["value"] for key, row in rows.items() if "metrics" in row}
    assert value["quantization"] > value["both"]
    assert value["cache"] > value["fewer_steps"]
    assert rows["compiled"]["cost"] == pytest.approx(10.2, abs=0.2)  # ten steps compute, ten cost a fiftieth
    assert [rows[key]["cost"] for key in EQUAL_COST] == [10, 10, 10]
    assert rows["fitted_solver"]["converged_psnr"] > rows["solver"]["converged_psnr"]
    # The interaction is what the squared errors of the three say.
    squared = {key: 4 / 10 ** (value[key] / 10) for key in ("both", "quantization", "cache")}
    expected = 10 * np.log10(squared["both"] / (squared["quantization"] + squared["cache"]))
    assert report["interaction_db"]["value"] == pytest.approx(expected)
    assert len(rows["both"]["latent_errors"]) == 20
    assert rows["both"]["latent_errors"][-1] == pytest.approx(rows["both"]["metrics"]["latent_error"]["value"])
    effects = [site["effect"] for site in report["sites"]]
    assert len(effects) == 8
    assert effects == sorted(effects, reverse=True)
    assert {fit["group"] for fit in report["scales"]} == {0, 1, 2}
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == report
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000

    again = json.loads(qcgraph("eval", bundle, *QUICK, "--no-sites", "--json").out)
    assert again == report | {"sites": [], "scales": []}
    other = json.loads(qcgraph("eval", bundle, *QUICK, "--json", "--seed", 1, "--no-attribution").out)
    metrics = next(row for row in other["rows"] if row["key"] == "compiled")["metrics"]
    for name, estimate in rows["compiled"]["metrics"].items():
        assert estimate["low"] <= metrics[name]["value"] <= estimate["high"], name
        assert metrics[name]["value"] != estimate["value"]


@pytest.mark.slow
def test_broken_scales_are_caught(broken_reference: Path, qcgraph: Callable[..., Any]) -> None:
    """One that is too coarse, and one that clips."""
    factors: dict[tuple[str, int], float] = {}
    for seed, factor in enumerate((4.0, 0.25)):
        generator = np.random.default_rng(seed)
        site = f"blocks.{generator.integers(2)}.{generator.choice(['attn.qkv', 'mlp.fc1', 'mlp.fc2'])}"
        factors[site, int(generator.integers(3))] = factor
    assert len(factors) == 2

    def change(tensors: dict[str, Any]) -> None:
        for (site, group), factor in factors.items():
            tensors[f"{site}.input_scale"][group] *= factor

    change_weights(broken_reference, change)
    done = qcgraph("eval", broken_reference, *ONE_SEED, "--json")
    assert done.code == 1
    faults = json.loads(done.out)["faults"]
    places = {f"{site}, group {group}" for site, group in factors}
    assert {fault["where"] for fault in faults if fault["kind"] == "scale"} == places
    assert f"scale at fault, {faults[0]['where']}" in done.err
    assert "hint:" in done.err


@pytest.mark.slow
def test_a_broken_compensation_is_caught(broken: Path, qcgraph: Callable[..., Any]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for table, neutral in (("gain", 1), ("slope", 0), ("offset", 0)):  # what should be made up for is doubled
            tensors[f"compensation.{table}"] = 2 * neutral - tensors[f"compensation.{table}"]

    change_weights(broken, change)
    done = qcgraph("eval", broken, *ONE_SEED, "--no-sites", "--json")
    assert done.code == 1
    assert {fault["kind"] for fault in json.loads(done.out)["faults"]} == {"compensation"}
    assert "compensation at fault" in done.err


@pytest.mark.slow
def test_a_broken_schedule_is_caught(broken_reference: Path, qcgraph: Callable[..., Any]) -> None:
    """As many steps compute, at the same cost, but not where they should."""
    order = np.random.default_rng(3).permutation(np.arange(1, 20))[:4]
    for name in ("plan.json", "program.json"):
        data = json.loads((broken_reference / name).read_text())
        steps = (data["plan"] if name == "plan.json" else data["facts"]["StepPlan"])["steps"]
        for index, step in enumerate(steps):
            step["variant"] = "full" if index < 6 or index in order else "reuse"
        (broken_reference / name).write_text(json.dumps(data))
    sign(broken_reference)
    done = qcgraph("eval", broken_reference, *ONE_SEED, "--no-sites", "--json")
    assert done.code == 1
    kinds = [fault["kind"] for fault in json.loads(done.out)["faults"]]
    assert "schedule" in kinds
    assert "schedule at fault" in done.err


@pytest.mark.slow
def test_a_plan_that_is_not_the_schedulers_is_caught(broken: Path, qcgraph: Callable[..., Any]) -> None:
    data = json.loads((broken / "plan.json").read_text())
    data["plan"]["steps"][7]["update"]["latent"] *= 1.001
    (broken / "plan.json").write_text(json.dumps(data))
    sign(broken)
    done = qcgraph("eval", broken, *QUICK, "--no-attribution")
    assert done.code == 1
    assert "plan at fault, plan.json" in done.err
    assert "step 7" in done.out


@pytest.mark.slow
def test_parts_that_are_not_there(qcgraph: Callable[..., Any], small_digits: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "plain", ("--steps", 4, "--bits", "off", "--cache", "interval=2", "--target", "torch")
    assert qcgraph("compile", small_digits, "-o", path, *options).code == 0
    assert json.loads((path / "report.json").read_text())["cached_edges"] == []
    report = json.loads(qcgraph("eval", path, "--samples", 4, "--seeds", 1, "--metrics", "psnr", "--json").out)
    rows = {row["key"]: row for row in report["rows"]}
    assert rows["quantization"]["absent"] == rows["both"]["absent"] == "it is not quantized"
    assert rows["cache"]["metrics"] == rows["compiled"]["metrics"]
    assert report["interaction_db"] is None
    assert report["sites"] == report["scales"] == []
    quick = json.loads(qcgraph("eval", path, "--quick", "--samples", 4, "--metrics", "psnr", "--json").out)
    assert [row["key"] for row in quick["rows"]] == ["full_precision", "cache", "compiled", *EQUAL_COST]
    assert {row["key"]: row for row in quick["rows"]}["compiled"] == rows["compiled"]


@pytest.mark.slow
def test_the_quick_form(reference: Path, qcgraph: Callable[..., Any]) -> None:
    """Both parts together are left out, and with them what they are needed for."""
    done = qcgraph("eval", reference, "--quick", "--threads", 1, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    rows = {row["key"]: row for row in report["rows"]}
    assert list(rows) == [*("full_precision", "quantization", "cache", "compiled"), *EQUAL_COST]
    assert (report["samples"], report["seeds"]) == (16, [0])
    assert set(rows["compiled"]["metrics"]) == {"psnr", "ssim"}
    assert all("converged_psnr" in row for row in rows.values())
    assert (report["faults"], report["sites"], report["scales"]) == ([], [], [])
    assert report["interaction_db"] is report["compensation_db"] is None


@pytest.mark.slow
def test_a_fitted_bundle_brings_its_rival(
    qcgraph: Callable[..., Any], small_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the compilation fitted in full precision is not fitted again, unless it is gone."""
    folder = tmp_path / "kept"
    monkeypatch.setattr("qcgraph.evaluation.kept.kept_folder", lambda: folder)
    path, options = tmp_path / "fitted", ("--steps", 6, "--solver", "fitted=3", "--bits", "off", "--target", "torch")
    assert qcgraph("compile", small_digits, "-o", path, *options).code == 0
    (solver,) = folder.iterdir()
    quick = ("eval", path, "--quick", "--samples", 4, "--metrics", "psnr", "--threads", 1, "--json")
    first = qcgraph(*quick)
    assert "plan-solver" not in first.err
    solver.unlink()
    again = qcgraph(*quick)
    assert "plan-solver" in again.err
    rows, others = ({row["key"]: row for row in done.json()["rows"]} for done in (first, again))
    found, other = (each["fitted_solver"]["converged_psnr"] for each in (rows, others))
    assert found == pytest.approx(other, abs=1e-3)


@pytest.mark.slow
def test_options_win_over_the_quick_form(reference: Path, qcgraph: Callable[..., Any]) -> None:
    options = ["--samples", 4, "--seeds", 2, "--seed", 1, "--metrics", "latent_error", "--no-attribution"]
    done = qcgraph("eval", reference, "--quick", *options, "--threads", 1)
    assert done.code == 0, done.err
    assert "4 samples of 2 seeds each" in done.out
    assert "latent error" in done.out
    assert "SSIM" not in done.out
    assert "interaction" not in done.out
    report = json.loads(qcgraph("eval", reference, "--quick", *options, "--threads", 1, "--json").out)
    assert report["seeds"] == [2, 3]
    assert [row["key"] for row in report["rows"]] == ["full_precision", "compiled"]


@pytest.mark.slow
def test_a_metric_asks_for_more_samples_than_the_quick_form(reference: Path, qcgraph: Callable[..., Any]) -> None:
    options = ["--no-attribution", "--gate", "accuracy>=0", "--threads", 1]
    assert "50 samples of 1 seed each" in qcgraph("eval", reference, "--quick", *options).out


@pytest.mark.slow
def test_the_gate_of_eval(bundle: Path, qcgraph: Callable[..., Any]) -> None:
    fast = (*QUICK, "--no-attribution")
    assert qcgraph("eval", bundle, *fast, "--gate", "psnr>=20").code == 0
    missed = qcgraph("eval", bundle, *fast, "--gate", "psnr>=20,latent_error<=0.001")
    assert missed.code == 1
    assert "the gate is not met: latent_error<=0.001 (it is 0.0" in missed.err
    assert "psnr>=20" not in missed.err
    assert "MISSED" in missed.out


@pytest.mark.slow
def test_the_gate_of_compile(qcgraph: Callable[..., Any], small_digits: Path, recipe: Path, tmp_path: Path) -> None:
    options = (small_digits, "--recipe", recipe, "--steps", 4, "--bits", "w8a8", "--groups", 1)
    missed = qcgraph("compile", *options, "-o", tmp_path / "missed", "--gate", "psnr>=90", "--target", "torch")
    assert missed.code == 1
    assert "the gate is not met: psnr>=90" in missed.err
    assert list(tmp_path.iterdir()) == []
    met = qcgraph("compile", *options, "-o", tmp_path / "met", "--gate", "psnr>=30,accuracy_drop<=0.05", "--json")
    assert met.code == 0, met.err
    (psnr, drop) = json.loads(met.out)["gate"]
    assert (psnr["term"], psnr["passed"], drop["passed"]) == ("psnr>=30", True, True)
    assert 30 <= psnr["value"] < 90


@pytest.mark.slow
def test_an_unsafe_cache_is_refused_unless_it_is_wanted(
    qcgraph: Callable[..., Any], small_digits: Path, recipe: Path, tmp_path: Path
) -> None:
    options = (small_digits, "--recipe", recipe, "--target", "torch", "--steps", 8, "--bits", "w2a2", "--groups", 1)
    options += ("--cache", "interval=2")
    refused = qcgraph("compile", *options, "-o", tmp_path / "refused")
    assert refused.code == 1
    assert "quantization and cache do not go together: quantization noise is" in refused.err
    assert "--allow-unsafe" in refused.err
    assert list(tmp_path.iterdir()) == []
    done = qcgraph("compile", *options, "-o", tmp_path / "allowed", "--allow-unsafe", "--json")
    assert done.code == 0, done.err
    (edge,) = json.loads(done.out)["cached_edges"]
    assert edge["snr"] < 0 < edge["change"] < edge["noise"]
    assert json.loads((tmp_path / "allowed" / "manifest.json").read_text())["overrides"] == ["unsafe-cache"]
    assert "allow_unsafe = true" in (tmp_path / "allowed" / "recipe.lock.toml").read_text()


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            ["--samples", 100],
            "FID-small needs at least 128 samples of each seed, not 100",
            "use --samples 128, or only",
        ),
        (["--samples", 3, "--metrics", "psnr"], "PSNR needs at least 4 samples", "use --samples 4"),
        (["--samples", 0], "0 samples", "1 or more"),
        (["--seeds", 0], "0 seeds", "1 or more"),
        (["--seed", -1], "seed -1 is negative", "0 or larger"),
        (["--threads", 0], "0 threads", "1 to 1024"),
        (["--metrics", "psnr,fid_smal"], "unknown metric 'fid_smal'", "did you mean 'fid_small'"),
        (["--metrics", "psnr", "--gate", "pnsr>=2"], "gate: no term 'pnsr'", "did you mean 'psnr'"),
        (["--sites", "--no-attribution"], "--sites needs the parts that --no-attribution", "leave one of the two out"),
        (["--quick", "--samples", 16, "--metrics", "accuracy"], "class accuracy needs at least 50", "use --samples 50"),
        (["--quick", "--samples", 16, "--gate", "accuracy>=0"], "class accuracy needs at least 50", "use --samples 50"),
        (["--quick", "--seeds", 0], "0 seeds", "1 or more"),
        (["--gate", "psnr"], "gate: cannot read 'psnr'", 'write it as "psnr>=28'),
        (["--model", "dit-s-2:random"], "compiled from another model", "--model"),
        (["--model", "dgits"], "unknown model", "did you mean 'digits'"),
        (["-o", "missing/folder"], "the folder around it does not exist", "make missing first"),
    ],
)
@pytest.mark.slow
def test_wrong_input(bundle: Path, qcgraph: Callable[..., Any], options: list[Any], message: str, hint: str) -> None:
    done = qcgraph("eval", bundle, *options)
    assert done.code == 2
    assert done.out == ""
    assert message in done.err
    assert hint in done.err.partition("hint:")[2]


def test_a_bundle_that_is_not_there(qcgraph: Callable[..., Any], tmp_path: Path) -> None:
    done = qcgraph("eval", tmp_path / "nothing")
    assert done.code == 2
    assert "hint:" in done.err


def test_a_gate_that_cannot_be_read_stops_before_anything(qcgraph: Callable[..., Any], tmp_path: Path) -> None:
    done = qcgraph("compile", "digits", "-o", tmp_path / "out", "--gate", "accuracy_dropp<=0.1")
    assert done.code == 2
    assert "no term 'accuracy_dropp'" in done.err
    assert "did you mean 'accuracy_drop'" in done.err


@pytest.mark.slow
def test_a_gate_needs_a_judge(qcgraph: Callable[..., Any], tmp_path: Path) -> None:
    done = qcgraph("compile", "dit-s-8:random", "-o", tmp_path / "out", "--steps", 2, "--gate", "fid_small<=3")
    assert done.code == 2
    assert "FID-small needs a feature network" in done.err
