"""The largest weight code of the CPU target is the largest that CPUs without VNNI multiply exactly.

They add two products of uint8 and int8 in 16 bits. Here that worst case is run: on this CPU, and, where QEMU's user
mode is installed (Debian: qemu-user), on one that certainly has AVX2 and no VNNI.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from qcgraph.export.targets import TARGETS

DEPTH = 64
PROGRAM = f"""
import json, sys
import numpy as np, onnx, onnxruntime
from onnx import TensorProto as T, helper, numpy_helper

def product(code):
    weight = numpy_helper.from_array(np.full(({DEPTH}, 32), code, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", T.UINT8, [8, {DEPTH}])],
        [helper.make_tensor_value_info("y", T.INT32, [8, 32])], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {{"x": np.full((8, {DEPTH}), 255, np.uint8)}})
    return int(y.min()), int(y.max())

print(json.dumps([product(int(code)) for code in sys.argv[1:]]))
"""
DEQUANTIZING = f"""
import json
import numpy as np, onnx
from onnx import TensorProto as T, helper, numpy_helper
from qcgraph.export.run.onnxruntime import load_session, session_options

initializers = [
    numpy_helper.from_array(np.full(({DEPTH}, 32), 127, np.int8), "w"),
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
    [helper.make_tensor_value_info(name, T.FLOAT, shape)] for name, shape in (("x", [8, {DEPTH}]), ("y", [8, 32]))
)
graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
sessions = [load_session(model, session_options(1, exact=exact)) for exact in (False, True)]
x = np.full((8, {DEPTH}), 127, np.float32)
print(json.dumps([int(session.run(None, {{"x": x}})[0].min()) for session in sessions]))
"""
HIGH = TARGETS["onnxruntime-cpu"].weight_high
EMULATOR = shutil.which("qemu-x86_64")


def products(codes: list[int], prefix: list[str]) -> list[list[int]]:
    """Smallest and largest element of 255 * code, summed over the depth, for each code."""
    command = [*prefix, os.path.realpath(sys.executable), "-c", PROGRAM, *map(str, codes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": PATHS})
    return json.loads(done.stdout)


PATHS = os.pathsep.join(path for path in sys.path if path)


@pytest.mark.parametrize("code", [HIGH, -HIGH])
def test_the_largest_code_is_exact_on_this_cpu(code: int) -> None:
    assert products([code], []) == [[255 * code * DEPTH] * 2]


@pytest.mark.parametrize("name", TARGETS)
def test_targets_know_whether_they_may_saturate(name: str) -> None:
    assert TARGETS[name].may_saturate == (TARGETS[name].weight_high > HIGH)


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="qemu-user is not installed")
def test_int8_activations_saturate_without_vnni_unless_they_are_multiplied_exactly() -> None:
    """As `qcgraph.export.run.onnxruntime.session_options` promises, in the form that targets with such codes have."""
    command = [str(EMULATOR), "-cpu", "Haswell", sys.executable, "-c", DEQUANTIZING]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    saturated, exact = json.loads(done.stdout)
    assert exact == 127 * 127 * DEPTH
    assert saturated < exact


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="qemu-user is not installed")
def test_the_largest_code_is_exact_without_vnni_and_the_next_is_not() -> None:
    prefix = [str(EMULATOR), "-cpu", "Haswell"]
    exact, saturated, full = products([HIGH, HIGH + 1, 127], prefix)
    assert exact == [255 * HIGH * DEPTH] * 2
    assert saturated[1] < 255 * (HIGH + 1) * DEPTH
    assert full[1] < 255 * 127 * DEPTH
