"""The tool that counts what TensorRT-RTX fuses a denoiser to: the claim that it is for, on a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fused_steps.py"


@pytest.mark.slow
def test_group_scales_cost_no_product_and_scales_at_run_time_cost_all(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, str(TOOL), "digits", "--devices", "8.9", "--json", "--forms", "ours", "runtime scales"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, runtime = json.loads(done.stdout)["rows"]
    assert (ours["form"], runtime["form"]) == ("ours", "runtime scales")
    assert ours["quantized_gemms"] == ours["planned"] == runtime["planned"] == 24
    assert runtime["quantized_gemms"] == 0
    assert ours["fused_attention"] == ours["attentions"] == ours["blocks"] == 6
    assert ours["steps"] <= runtime["steps"]
