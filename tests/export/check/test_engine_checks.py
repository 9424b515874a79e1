"""What engines should have been fused to, judged on steps that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qcgraph.export.check.check import Check
from qcgraph.export.check.engine_checks import Expected, Library, check_fusion
from qcgraph.export.tensorrt.steps import FusedStep, FusedSteps

WHOLE = FusedSteps(
    (
        FusedStep("fully_connected", "m", ("q", "k", "v", "dequantize"), 1),  # merged: they share an activation
        FusedStep("function", "_gemm_mha_v2", ("attention",)),
        FusedStep("runtime_fusion", "f", ("proj",), 1),
    ),
    0,
)
PARTS = FusedSteps(
    (
        FusedStep("fully_connected", "m", ("q", "k", "v"), 1),
        FusedStep("fully_connected", "f", ("attention",)),
        FusedStep("runtime_fusion", "f", ("proj",)),
    ),
    2,
)
NAMES = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "proj": "attn.proj"}
EXPECTED = Expected(NAMES, (), {"attention": "attn.attention"}, ("If choice",), is_half=True)


def check(expected: Expected, **engines: FusedSteps) -> dict[str, Check]:
    return {found.name: found for found in check_fusion("full", expected, engines)}


def test_merged_products_count_for_each_of_them() -> None:
    checks = check(EXPECTED, a=WHOLE, b=WHOLE)
    assert all(found.passed for found in checks.values())
    assert checks["8-bit products"].detail == "4 quantized products in 2 GEMMs of 8 bits"
    assert checks["fused attention"].detail == "each of 1 is one kernel"


def test_what_is_not_fused_is_named_with_the_gpu() -> None:
    checks = check(EXPECTED, a=WHOLE, b=PARTS)
    assert not any(found.passed for found in checks.values())
    assert checks["8-bit products"].detail == "not in a product of 8 bits: for b attn.proj"
    assert (checks["8-bit products"].value, checks["fused attention"].value) == (1, 1)
    assert checks["fused attention"].detail == "in parts: for b attn.attention"
    assert checks["conditional jumps"].detail == "2 in the engine in If choice: no CUDA graph can hold it"


def test_a_planned_linear_that_the_graph_does_not_quantize_is_named() -> None:
    absent = Expected({}, ("mlp.fc1",), {}, (), is_half=False)
    found = check(absent, a=WHOLE)["8-bit products"]
    assert (found.passed, found.detail) == (False, "not in a product of 8 bits: for every GPU mlp.fc1")


def test_attention_in_float32_is_not_judged() -> None:
    found = check(Expected({}, (), {"attention": "attn.attention"}, (), is_half=False), a=PARTS)["fused attention"]
    assert found.passed is None
    assert found.detail.startswith("not met: TensorRT fuses attention of 16 bits only")


@pytest.mark.parametrize(("version", "is_probed"), [("1.7.1.116", True), ("1.7", True), ("1.8.0", False)])
def test_only_known_versions_are_looked_into(version: str, is_probed: bool) -> None:
    assert Library("TensorRT-RTX", SimpleNamespace(__version__=version)).is_probed is is_probed
