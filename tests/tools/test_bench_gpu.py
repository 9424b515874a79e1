"""tools/bench_gpu.py as far as it goes without a GPU: PyTorch on a CPU, what it says, and what it goes on after."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qcgraph.benchmark.timing import Timing
from qcgraph.errors import UsageError
from qcgraph.models import LoadedModel
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.progress import Progress
from qcgraph.sampling.loop import sample

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_gpu.py"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the tool in this process: its exit code, what it printed, and what it said."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [TOOL.name, *map(str, arguments)])
        code = module("bench_gpu").main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a part of the tool."""
    monkeypatch.syspath_prepend(TOOL.parent)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "hint: run it with an NVIDIA GPU, or --device cpu for PyTorch alone" in err


def test_pytorch_is_measured_and_what_fails_is_reported(run: Run) -> None:
    options = ["--device", "cpu", "--parts", "torch", "--steps", 2, "--samples", "1", "--rounds", 1, "--json"]
    code, out, err = run("digits", "no-such-model", *options)
    assert code == 1, err
    document = json.loads(out)
    assert (document["kind"], document["format"]) == ("gpu", 1)
    digits, unknown = document["models"]
    assert digits["plan"] == "ddim, 2 steps, guidance 4"
    assert [(row["name"], row["samples"]) for row in digits["rows"]] == [("torch fp32", 1), ("torch bf16", 1)]
    assert all(row["sampling"]["seconds"][0] > row["steps"]["forward"]["seconds"][0] / 2 > 0 for row in digits["rows"])
    assert digits["failures"] == []
    assert [failure["part"] for failure in unknown["failures"]] == ["load the model"]


@pytest.mark.parametrize(
    ("options", "what"), [(["--parts", "tensors"], "unknown part 'tensors'"), (["--samples", "one"], "whole numbers")]
)
def test_what_is_refused(run: Run, options: list[str], what: str) -> None:
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert what in err


def test_sampling_on_tensors_is_that_of_the_bundle(module: Any, tiny_model: LoadedModel, eager_runner: Any) -> None:
    sampling = module("bench_gpu_sampling")
    plan = make_step_plan("ddim", 3, 1.5, tiny_model.spec.noise_schedule, "")
    denoise = sampling.torch_denoiser(tiny_model, torch.float32, None, torch.device("cpu"))
    latents = sampling.draw(denoise, plan, tiny_model.spec, 2, torch.device("cpu"))
    assert latents.shape == (2, *tiny_model.spec.latent_shape)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcgraph.sampling.noise.Noise.initial", lambda self: noise)
        expected = sample(eager_runner(tiny_model), plan, tiny_model.spec, [0, 1], seed=0)
    torch.testing.assert_close(latents, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    half = sampling.torch_denoiser(tiny_model, torch.bfloat16, None, torch.device("cpu"))
    near = sampling.draw(half, plan, tiny_model.spec, 2, torch.device("cpu"))
    assert torch.linalg.norm(near - latents) < 0.05 * torch.linalg.norm(latents)
    with pytest.raises(UsageError, match="samples with ddim alone"):
        sampling.draw(
            denoise,
            make_step_plan("ddpm", 3, 1.5, tiny_model.spec.noise_schedule, ""),
            tiny_model.spec,
            1,
            latents.device,
        )


def test_the_table(module: Any) -> None:
    report_of = module("bench_gpu_report")
    report = report_of.ModelReport("toy", "ddim, 2 steps, guidance 4")
    steps = {"full": Timing.of([0.004]), "reuse": Timing.of([0.0005])}
    report.rows = [
        report_of.Row("torch fp32", 1, {"forward": Timing.of([0.008])}, "forward", Timing.of([2.0])),
        report_of.Row("engines, cached", 1, steps, "full", Timing.of([0.5]), (1, 2)),
    ]
    report.agreement = {"onnxruntime": {"0 full": 0.001}}

    def fails() -> None:
        raise RuntimeError("no\n kernel")

    assert report.attempt("build engines", Progress(), fails) is None
    text = report_of.markdown(report)
    assert (
        "| engines, cached | 1 | 4.000 / 4.000 / 4.000 | 0.500 / 0.500 / 0.500 | 0.500 / 0.500 / 0.500 | 4.00x | - |"
        in text
    )
    assert "- engines, cached, 1 samples: 1 of 2 as CUDA graphs" in text
    assert "- engines against onnxruntime, relative L2 of a prediction: 0 full 1.0e-03" in text
    assert "- failed: build engines: RuntimeError: no kernel" in text
