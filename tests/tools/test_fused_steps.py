"""The tool that counts what TensorRT-RTX fuses a denoiser to: the claim that it is for, on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_group_scales_cost_no_product_and_scales_at_run_time_cost_all(
    run_tool: Any, small_digits: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    asked = [small_digits, "--devices", "8.9", "--json", "--forms", "ours", "runtime scales"]
    done = run_tool("fused_steps.py", *asked, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, runtime = json.loads(done.stdout)["rows"]
    assert (ours["form"], runtime["form"]) == ("ours", "runtime scales")
    assert ours["quantized_gemms"] == ours["planned"] == runtime["planned"] == 8
    assert runtime["quantized_gemms"] == 0
    assert ours["fused_attention"] == ours["attentions"] == ours["blocks"] == 2
    assert ours["steps"] <= runtime["steps"]
