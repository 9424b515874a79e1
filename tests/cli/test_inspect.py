"""qcgraph inspect, diff and verify on a bundle; inspect on a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcgraph.bundle import Bundle
from qcgraph.bundle.report import SolverReport
from qcgraph.cli.ir_text import read_program_text
from qcgraph.facts import SolverFit, SolverPlan, SolverTargets, decode
from qcgraph.ir.program import Program
from qcgraph.models.files import DIGITS_FOLDER
from qcgraph.plan.steps import Earlier, Update

Command = Callable[..., Any]


def test_overview(qcgraph: Command, bundle: Path) -> None:
    done = qcgraph("inspect", bundle)
    assert (done.code, done.err) == (0, "")
    for line in (
        "sampling   ddim, 3 steps, guidance 1.5",
        "schedule   FRF   (F = full, R = reuse)",
        "cache      change over blocks 0..0",
        "budget     70.0% of computing every step, in milliseconds on onnxruntime (joint schedule)",
        "forecast   affine, off by 5.0% (at most 5.0%) where reuse is off by 20.0%",
        "full       2      6  latent         noise_prediction, cache  1 add.Tensor, 1 conv2d,",
        "001  plan-cache{interval=2}        -  facts only",
        "002  plan-quant                    1  facts only",
        "003  insert-cache                  -  main +0 -5 nodes, full +6 -0 nodes, reuse +1 -0 nodes",
        "004  lower-linear                  -  nothing",
    ):
        assert line in done.out


def test_overview_as_json(qcgraph: Command, bundle: Path) -> None:
    data = qcgraph("inspect", bundle, "--json").json()
    assert data["target"] == "onnxruntime-cpu"
    assert data["graphs"]["reuse"]["ops"] == {"add.Tensor": 1}
    assert data["passes"][2]["graphs"]["full"]["added"]["sub.Tensor"] == 1


@pytest.mark.parametrize("show", ["schedule", "solver", "scales", "refused", "sites", "pipeline"])
def test_views(qcgraph: Command, bundle: Path, show: str) -> None:
    table, data = qcgraph("inspect", bundle, "--show", show), qcgraph("inspect", bundle, "--show", show, "--json")
    assert table.code == data.code == 0
    assert table.out.strip()
    assert len(data.json()) >= 1


def test_schedule(qcgraph: Command, bundle: Path) -> None:
    rows = qcgraph("inspect", bundle, "--show", "schedule", "--json").json()
    assert [(row["timestep"], row["variant"], row["group"]) for row in rows] == [
        (981.0, "full", 0),
        (961.0, "reuse", 0),
        (1.0, "full", 1),
    ]


def test_a_schedule_with_forecasts(qcgraph: Command, bundle: Path) -> None:
    rows = qcgraph("inspect", bundle, "--show", "schedule", "--json").json()
    assert [row["forecast_errors"] for row in rows] == [{}, {"cache": 0.05}, {}]
    header, *lines = qcgraph("inspect", bundle, "--show", "schedule").out.splitlines()
    assert "forecast off by" in header
    assert ["5.0%" in line for line in lines[-3:]] == [False, True, False]


def test_a_schedule_that_looks_back(qcgraph: Command, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "toy", history=(Earlier(-0.5, 0.25),))
    rows = qcgraph("inspect", path, "--show", "schedule", "--json").json()
    assert [row["history"] for row in rows] == [[], [{"latent": -0.5, "noise_prediction": 0.25}], []]
    heading, first, second, _ = qcgraph("inspect", path, "--show", "schedule").out.splitlines()
    assert heading.endswith("+ c3 z  + x, 1 back  + eps, 1 back")
    assert first.endswith("0.000000")
    assert second.split()[-2:] == ["-0.500000", "0.250000"]


@pytest.mark.slow
def test_a_fitted_solver(qcgraph: Command, fitted_bundle: Path) -> None:
    bundle = Bundle.open(fitted_bundle)
    data = qcgraph("inspect", fitted_bundle, "--show", "solver", "--json").json()
    assert bundle.report is not None
    assert bundle.report.solver == SolverReport.model_validate(data["fitted"])
    assert [data["fitted"][key] for key in ("target", "steps", "run_steps", "trajectories")] == ["converged", 4, 8, 4]
    assert data["fitted"]["last_error"] == data["steps"][-1]["error"]
    assert data["tried_errors"] == sorted(data["tried_errors"])
    assert [row["timestep"] for row in data["steps"]] == list(bundle.plan.timesteps)
    assert [decode(Update, row["update"]) for row in data["steps"]] == [step.update for step in bundle.plan.steps]
    assert all(row["error"] <= row["plain_error"] for row in data["steps"])

    lines = qcgraph("inspect", fitted_bundle, "--show", "solver").out.splitlines()
    solver, tried, fit, updates, _, heading, *rows = lines
    assert solver == "solver   4 of 8 steps, fitted to the converged run"
    assert tried.count(" dB") == len(data["tried_errors"])
    assert "4 trajectories" in fit
    assert "one step before" in updates
    assert heading.split()[:5] == ["step", "timestep", "x", "eps", "eps-1"]
    assert heading.endswith("plain x  plain eps  plain error")
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    assert max(map(len, lines)) <= 120

    overview = qcgraph("inspect", fitted_bundle).out
    assert "solver     4 of 8 steps, fitted to the converged run" in overview
    assert "--show schedule|solver|" in overview


def test_no_solver_is_fitted(qcgraph: Command, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "toy", history=(Earlier(-0.5, 0.25),))
    data = qcgraph("inspect", path, "--show", "solver", "--json").json()
    assert (data["fitted"], data["tried_errors"]) == (None, [])
    assert [set(row) for row in data["steps"]] == [{"step", "timestep", "update"}] * 3
    assert qcgraph("inspect", path, "--show", "solver").out.splitlines() == [
        "solver   none is fitted: the updates are those of ddim",
        "updates  x' = c0 x + c1 eps + ..; eps-1 is the prediction of one step before",
        "",
        "step  timestep       x      eps       z   eps-1      x-1",
        "   0       981  1.0100  -0.1000  0.0000",
        "   1       961  1.1000  -0.2000  0.0000  0.2500  -0.5000",
        "   2         1  1.2000  -0.3000  0.2500",
    ]


def test_steps_that_were_chosen_but_not_fitted_again(
    qcgraph: Command, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """As a pipeline leaves them that has plan-solver alone."""
    chosen = SolverPlan("run", 9, (Update(1.0, -0.1),) * 3, 3, (0.0,))
    bundle = make_bundle(tmp_path / "toy", more_facts=(chosen, SolverTargets(0, 5, ())))
    out = qcgraph("inspect", bundle, "--show", "solver").out
    assert "solver   3 of 9 steps, fitted to the run itself" in out
    assert "final latents off by 0 (mean square)" in out
    assert "5 trajectories" in out
    assert "ridge" not in out
    assert "plain x" in out


def test_a_step_that_kept_its_plain_update(qcgraph: Command, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    chosen = SolverPlan("run", 9, (Update(1.0, -0.1),) * 3, 3, (0.01, 0.1))
    fit = SolverFit((1e-8, None, 1e-3), (0.5, 0.25, 0.125), (1.0, 0.25, 0.5), 4)
    bundle = make_bundle(tmp_path / "toy", more_facts=(chosen, fit))
    rows = qcgraph("inspect", bundle, "--show", "solver", "--json").json()["steps"]
    assert [row["ridge"] for row in rows] == [1e-8, None, 1e-3]
    lines = qcgraph("inspect", bundle, "--show", "solver").out.splitlines()
    assert "off by -20.0 dB, -10.0 dB (mean square)" in lines[1]
    assert [line.split()[5:7] for line in lines[-4:]] == [
        ["ridge", "error"],
        ["1e-08", "0.5"],
        ["plain", "0.25"],
        ["1e-03", "0.125"],
    ]


def test_sites_say_why_they_stay_in_floating_point(qcgraph: Command, bundle: Path) -> None:
    assert qcgraph("inspect", bundle, "--show", "sites").out.splitlines()[1:] == [
        "blocks.0.attn.qkv  integer",
        "x_embedder.proj    float       conv2d is not a linear layer",
    ]


@pytest.mark.parametrize("asked", ["insert-cache", "3", "003"])
def test_program_after_a_pass(qcgraph: Command, bundle: Path, asked: str) -> None:
    text = (bundle / "ir" / "003_insert-cache.txt").read_text()
    assert qcgraph("inspect", bundle, "--after", asked).out == text


def test_one_graph(qcgraph: Command, bundle: Path) -> None:
    out = qcgraph("inspect", bundle, "--graph", "reuse").out
    assert out.startswith("graph reuse(")
    assert out.endswith("}\n")
    assert "graph full" not in out


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.0", ["linear", "unbind", "getitem"]),
        ("blocks.0.attn", ["linear", "unbind", "getitem"]),
        ("*.qkv", ["linear"]),
        ("un*", ["unbind"]),
        ("top level", ["add", "sub", "add"]),
    ],
)
def test_nodes(qcgraph: Command, bundle: Path, pattern: str, names: list[str]) -> None:
    graphs = qcgraph("inspect", bundle, "--node", pattern, "--json").json()["graphs"]
    assert [node["name"] for nodes in graphs.values() for node in nodes] == names


def test_nodes_are_printed_under_their_module(qcgraph: Command, bundle: Path) -> None:
    assert qcgraph("inspect", bundle, "--node", "*.qkv").out == (
        "graph full\n"
        "  ; blocks.0.attn.qkv\n"
        "  %linear: f32[B,16,96] = linear(%conv2d, @blocks.0.attn.qkv.weight: f32[96,32])\n"
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--after", "insert-cach"], "no pass 'insert-cach'"),
        (["--after", "9"], "no pass '9'"),
        (["--after", "9" * 4301], "no pass '9999"),
        (["--graph", "ful"], "did you mean 'full'?"),
        (["--node", "nothing"], "no node matches 'nothing'"),
        (["--node", "add", "--show", "sites"], "give one of them"),
    ],
)
def test_refused(qcgraph: Command, bundle: Path, options: list[str], what: str) -> None:
    done = qcgraph("inspect", bundle, *options)
    assert (done.code, done.out) == (2, "")
    assert what in done.err


def test_neither_bundle_nor_model(qcgraph: Command, tmp_path: Path) -> None:
    assert "is neither a bundle nor a model folder" in qcgraph("inspect", tmp_path).err
    assert "there is no such bundle or model" in qcgraph("inspect", tmp_path / "absent").err
    assert "unknown model" in qcgraph("inspect", "digitz").err


@pytest.mark.slow
def test_model(qcgraph: Command) -> None:
    data = qcgraph("inspect", "digits", "--json").json()
    assert data == qcgraph("inspect", DIGITS_FOLDER, "--json").json()  # a trained folder is a model
    assert len(data["blocks"]) == 6
    assert 0 < data["quantizable_macs"] < data["macs"]
    refused = qcgraph("inspect", "digits", "--show", "refused").out
    assert "x_embedder.proj" in refused
    assert "attn.qkv" not in refused


@pytest.mark.parametrize("options", [["--after", "1"], ["--show", "scales"], ["--show", "solver"]])
def test_a_model_was_not_compiled(qcgraph: Command, options: list[str]) -> None:
    done = qcgraph("inspect", "digits", *options)
    assert done.code == 2
    assert "hint: compile it, and inspect the bundle" in done.err


# diff


def test_diff_of_passes(qcgraph: Command, bundle: Path) -> None:
    done = qcgraph("diff", bundle, "plan-quant", "insert-cache")
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[0].startswith("graph main: -1 add.Tensor, ")
    assert lines[2] == "graph reuse: +1 add.Tensor"
    assert "--- 002_plan-quant" in lines
    assert "+  return noise_prediction = %add, cache = %sub" in lines


def test_diff_of_the_same(qcgraph: Command, bundle: Path) -> None:
    assert qcgraph("diff", bundle, 3, 4).out == "program: same\n"
    assert qcgraph("diff", bundle, bundle).out.splitlines() == [
        f"{what}: same" for what in ("made with", "recipe", "plan", "facts", "program")
    ]


def test_diff_of_facts_alone(qcgraph: Command, bundle: Path) -> None:
    assert "+cache cache_0: change over blocks 0..0" in qcgraph("diff", bundle, 0, 1).out.splitlines()


def test_diff_of_bundles(qcgraph: Command, bundle: Path, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", guidance=2.0)
    data = qcgraph("diff", bundle, other, "--json").json()
    assert data["recipe"] == {"sampling.guidance": [1.5, 2.0]}
    assert data["plan"] == {"sampling": ["ddim, 3 steps, guidance 1.5", "ddim, 3 steps, guidance 2"]}
    assert list(data["facts"]) == ["StepPlan"]
    assert "sampling.guidance  1.5" in qcgraph("diff", bundle, other).out


def test_diff_needs_two(qcgraph: Command, bundle: Path) -> None:
    done = qcgraph("diff", bundle, "insert-cache")
    assert done.code == 2
    assert "a second pass is missing" in done.err


# verify


def test_verify_names_every_damaged_file(qcgraph: Command, bundle: Path) -> None:
    (bundle / "plan.json").write_text("{}")
    (bundle / "recipe.lock.toml").unlink()
    done = qcgraph("verify", bundle, "--json")
    assert done.code == 2
    assert "the file is truncated" in done.err
    assert "also damaged: recipe.lock.toml" in done.err
    assert "hint: copy or compile the bundle again" in done.err


def test_verify_needs_a_bundle(qcgraph: Command, tmp_path: Path) -> None:
    assert qcgraph("verify", tmp_path).code == 2


# program text


def test_reads_what_the_printer_wrote(captured: Program) -> None:
    program = read_program_text(captured.text)
    calls = [node for node in captured.variants["main"].graph.nodes if node.op == "call_function"]
    assert [node.name for node in program.graphs["main"].nodes] == [node.name for node in calls]
    assert program.facts.startswith("model tiny: latent 2x8x8")
    assert program.graphs["main"].ops["linear"] > 0
