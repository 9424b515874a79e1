"""What an engine was fused to, read out of texts that were cut from engines of TensorRT-RTX 1.7.1."""

from __future__ import annotations

from pathlib import Path

from qcgraph.export.tensorrt.steps import FusedStep, FusedSteps, fused_steps

SAMPLES = Path(__file__).parent / "engine_samples"


def steps_of(name: str) -> FusedSteps:
    """The steps of a recorded engine: its programs between bytes that are no text, as in a file."""
    programs = (SAMPLES / f"{name}.txt").read_bytes().split(b"----\n")
    found = fused_steps(b"ftrt\x00\xff\xfe" + b"\x00\x01\xa1\xda".join(programs) + b"\x00\xff")
    assert found is not None
    return found


def test_an_int8_product_and_fused_attention() -> None:
    """A linear in reference-scale form, split into q, k and v."""
    found = steps_of("int8_and_attention")
    assert [step.kind for step in found.steps] == ["function", "fully_connected", "function", "function", "function"]
    assert (found.quantized_gemms, found.fused_attention, found.conditional_jumps) == (1, 1, 0)
    assert found.steps[1] == FusedStep("fully_connected", "node_of_m", ("node_of_m", "node_of_d", "node_of_wd"), 1)
    assert {"node_of_mr", "node_of_a", "node_of_q1"} <= set(found.steps[2].layers)


def test_a_product_of_dequantized_values_is_not_int8() -> None:
    """The same with a constant scale alone: TensorRT splits the weight first, and dequantizes both operands."""
    found = steps_of("fused_product")
    (product,) = (step for step in found.steps if step.kind == "runtime_fusion")
    assert product == FusedStep("runtime_fusion", "__myl_CastMulFc", ("node_of_m", "node_of_d"), 0)
    assert (len(found.steps), found.quantized_gemms, found.fused_attention) == (8, 0, 1)


def test_a_fused_product_of_int8() -> None:
    """What a fusion multiplies stands in the program of the fusion."""
    text = (SAMPLES / "fused_product.txt").read_bytes()
    whole = text.replace(b'"__mye5379" "__mye5803"', b'"__mye5594_q8" "__mye5803"')
    whole = whole.replace(b"strides={ 49152 384 1 } type=half", b"strides={ 49152 384 1 } type=int8")
    found = fused_steps(whole.replace(b"----\n", b"\x00"))
    assert found is not None
    assert found.quantized_gemms == 1


def test_a_conditional_jumps() -> None:
    found = steps_of("conditional")
    assert found.conditional_jumps == 1
    assert {step.kind for step in found.steps}.isdisjoint({"cjmp", "jmp", "shape_call"})


def test_bytes_without_a_program() -> None:
    assert fused_steps(b"") is None
    assert fused_steps(b"an engine of another version, header {}") is None
    assert fused_steps(memoryview(b"header {\n  version = 5\n")) is None


def test_the_nodes_of_int8_products_and_of_fused_attention() -> None:
    found = steps_of("int8_and_attention")
    assert found.quantized_layers == {"node_of_m", "node_of_d", "node_of_wd"}
    assert found.attention_layers == {"node_of_y"}
    assert steps_of("fused_product").quantized_layers == set()
