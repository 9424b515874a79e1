"""The largest sum of two weight codes of the CPU target is the largest that CPUs without VNNI multiply exactly.

They add two products of uint8 and int8 in 16 bits, those of the inputs 2k and 2k + 1. Here that worst case is run: on
this CPU, and, where QEMU's user mode is installed (Debian: qemu-user), on one that certainly has AVX2 and no VNNI.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from qcgraph.export.targets import TARGETS

DEPTHS = (64, 70, 300)  # a power of two, one that is no multiple of four, one that kernels split
PROGRAM = """
import json, sys
import numpy as np, onnx, onnxruntime
from onnx import TensorProto as T, helper, numpy_helper

def wrong(depth, codes, batch, packed):
    # The pairs of inputs whose products are added wrongly, if only they have codes.
    pairs = [(i, j) for i in range(depth) for j in range(i + 1, min(depth, i + 9))]
    weight = np.zeros((depth, len(pairs)), np.int8)
    for column, pair in enumerate(pairs):
        weight[pair, column] = codes
    inputs = [helper.make_tensor_value_info("x", T.UINT8, [batch, depth])]
    held = [numpy_helper.from_array(weight, "w")]
    if not packed:
        inputs, held = [*inputs, helper.make_tensor_value_info("w", T.INT8, list(weight.shape))], []
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g", inputs,
        [helper.make_tensor_value_info("y", T.INT32, [batch, len(pairs)])], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.full((batch, depth), 255, np.uint8)
    (y,) = session.run(None, {"x": x} if packed else {"x": x, "w": weight})
    right = x.astype(np.int32) @ weight.astype(np.int32)
    return [pair for pair, same in zip(pairs, (y == right).all(axis=0)) if not same]

depths, *codes = json.loads(sys.argv[1])
forms = [(depth, batch, packed) for depth in depths for batch in (1, 2, 33) for packed in (True, False)]
print(json.dumps([[wrong(depth, pair, batch, packed) for depth, batch, packed in forms] for pair in codes]))
"""
DEQUANTIZING = """
import json
import numpy as np, onnx
from onnx import TensorProto as T, helper, numpy_helper
from qcgraph.export.run.onnxruntime import load_session, session_options

initializers = [
    numpy_helper.from_array(np.full((64, 32), 127, np.int8), "w"),
    numpy_helper.from_array(np.ones(32, np.float32), "sw"),
    numpy_helper.from_array(np.float32(1), "s"),
    numpy_helper.from_array(np.int8(0), "z"),
]
nodes = [
    helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
    helper.make_node("DequantizeLinear", ["w", "sw"], ["b"], axis=1),
    helper.make_node("MatMul", ["a", "b"], ["y"]),
]
inputs, outputs = (
    [helper.make_tensor_value_info(name, T.FLOAT, shape)] for name, shape in (("x", [8, 64]), ("y", [8, 32]))
)
graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
sessions = [load_session(model, session_options(1, exact=exact)) for exact in (False, True)]
x = np.full((8, 64), 127, np.float32)
print(json.dumps([int(session.run(None, {"x": x})[0].min()) for session in sessions]))
"""
PAIR = TARGETS["onnxruntime-cpu"].pair_high or 0
EXACT = [(127, PAIR - 127), (PAIR // 2, PAIR // 2), (-127, 127 - PAIR), (127, -127)]
EMULATOR = shutil.which("qemu-x86_64")
PATHS = os.pathsep.join(path for path in sys.path if path)


def wrong_pairs(codes: list[tuple[int, int]], prefix: list[str]) -> list[list[list[list[int]]]]:
    """The pairs of inputs that are added wrongly, for each pair of codes and each form of the product."""
    asked = json.dumps([DEPTHS, *codes])
    command = [*prefix, os.path.realpath(sys.executable), "-c", PROGRAM, asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": PATHS})
    return json.loads(done.stdout)


def test_the_largest_codes_are_exact_on_this_cpu() -> None:
    assert not any(pairs for found in wrong_pairs(EXACT, []) for pairs in found)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_know_whether_they_may_saturate(name: str) -> None:
    assert TARGETS[name].may_saturate == (name != "onnxruntime-cpu")


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="qemu-user is not installed")
def test_int8_activations_saturate_without_vnni_unless_they_are_multiplied_exactly() -> None:
    """As `qcgraph.export.run.onnxruntime.session_options` promises, in the form that targets with such codes have."""
    command = [str(EMULATOR), "-cpu", "Haswell", sys.executable, "-c", DEQUANTIZING]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    saturated, exact = json.loads(done.stdout)
    assert exact == 127 * 127 * 64
    assert saturated < exact


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="qemu-user is not installed")
def test_only_pairs_with_a_larger_sum_are_wrong_without_vnni() -> None:
    """Which inputs are added in 16 bits is how ONNX Runtime packs weights, whatever the batch and the depth."""
    too_large = [(127, PAIR - 126), (-127, 126 - PAIR), (127, 127)]
    *exact, one, other, full = wrong_pairs(EXACT + too_large, [str(EMULATOR), "-cpu", "Haswell"])
    assert not any(pairs for found in exact for pairs in found)
    for found in (one, other, full):
        for pairs in found:
            assert pairs
            assert all(first % 2 == 0 and second == first + 1 for first, second in pairs)
