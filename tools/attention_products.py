"""Measure the latency of one attention in ONNX Runtime, with its products in floating point and in integers.

    python tools/attention_products.py --threads 2

Each form is a graph as a bundle has it: attention as one node; attention split into its products; and its products in
integers, with the probabilities in one region or in two (in two planes, or in one tensor). All forms take turns in one
process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from qcgraph.benchmark.machine import read_machine, versions
from qcgraph.bundle.manifest import PACKAGES

OPSET = 23
KERNEL = "MatMulIntegerToFloat"
COLUMNS = ("attention", "form", "median ms", "relative", "int8 products")
CALLS = 3  # calls in a row, before the next form takes its turn


@dataclass(frozen=True)
class Geometry:
    """One attention of a denoiser: samples with both halves of guidance, heads, tokens and the length of a head."""

    name: str
    batch: int
    heads: int
    tokens: int
    length: int


GEOMETRIES = (
    Geometry("DiT-S/2, 256 pixels", 2, 6, 256, 64),
    Geometry("DiT-XL/2, 256 pixels", 2, 16, 256, 72),
    Geometry("DiT-S/2, 512 pixels", 2, 6, 1024, 64),
)


def main() -> int:
    """Measure all forms, and print the results."""
    options = parse()
    document = {
        "kind": "attention-products",
        "format": 1,
        "threads": options.threads,
        "machine": asdict(read_machine()),
        "versions": versions(PACKAGES),
        "rows": [row for geometry in GEOMETRIES for row in measure(geometry, options)],
    }
    print(json.dumps(document, indent=2) if options.json else markdown(document))
    return 0


def markdown(document: dict[str, Any]) -> str:
    """Return the rows as a table."""
    lines = [f"{document['threads']} threads.", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in document["rows"]:
        figures = (f"{row['milliseconds']:.2f}", f"{row['relative']:.2f}", str(row["kernels"]))
        lines.append(f"| {' | '.join((row['geometry'], row['form'], *figures))} |")
    return "\n".join(lines)


def measure(geometry: Geometry, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the median latency of every form."""
    rng = np.random.default_rng(0)
    shape = (geometry.batch, geometry.heads, geometry.tokens, geometry.length)
    query, key, value = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    packed = [
        np.ascontiguousarray(array.transpose(0, 2, 1, 3)).reshape(shape[0], shape[2], -1)
        for array in (query, key, value)
    ]
    split = [query * np.float32(shape[-1] ** -0.5), np.ascontiguousarray(key.swapaxes(2, 3)), value]
    sessions = {
        form: (_session(nodes, packed if form == FUSED else split, options.threads), packed if form == FUSED else split)
        for form, nodes in forms(geometry).items()
    }
    times: dict[str, list[float]] = {form: [] for form in sessions}
    for _ in range(options.rounds + 1):  # the first round warms up
        for form, ((session, _), inputs) in sessions.items():
            feed = dict(zip("qkv", inputs, strict=True))
            start = time.perf_counter()
            for _ in range(CALLS):
                session.run(None, feed)
            times[form].append((time.perf_counter() - start) / CALLS * 1e3)
    medians = {form: float(np.median(found[1:])) for form, found in times.items()}
    return [
        {
            "geometry": geometry.name,
            "form": form,
            "milliseconds": median,
            "relative": median / medians[FUSED],
            "kernels": sessions[form][0][1],
        }
        for form, median in medians.items()
    ]


FUSED = "one node"


def forms(geometry: Geometry) -> dict[str, list[Any]]:
    """Return the nodes of every form, from q, k and v to o."""
    node = helper.make_node
    products = [node("MatMul", ["q", "k"], ["s"]), node("Softmax", ["s"], ["p"]), node("MatMul", ["p", "v"], ["o"])]
    logits = [
        *_pair("q", "query"),
        *_pair("k", "key"),
        node("MatMul", ["q_d", "k_d"], ["s"]),
        node("Softmax", ["s"], ["p"]),
    ]
    below, above = (
        [node("Less", ["p", "split"], ["is_below"]), node("Where", ["is_below", "p", "zero"], ["below"])],
        [node("Where", ["is_below", "zero", "p"], ["above"]), *_pair("above", "coarse")],
    )
    values = _pair("v", "key")
    return {
        FUSED: [node("Attention", ["q", "k", "v"], ["o"], q_num_heads=geometry.heads, kv_num_heads=geometry.heads)],
        "split, in floating point": products,
        "integers, one region": [*logits, *_pair("p", "whole"), *values, node("MatMul", ["p_d", "v_d"], ["o"])],
        "integers, two regions in one tensor": [
            *logits,
            *below,
            *above,
            node("Add", ["below", "above_d"], ["both"]),
            *_pair("both", "fine"),
            *values,
            node("MatMul", ["both_d", "v_d"], ["o"]),
        ],
        "integers, two planes": [
            *logits,
            *below,
            *above,
            *_pair("below", "fine"),
            *values,
            node("MatMul", ["below_d", "v_d"], ["lower"]),
            node("MatMul", ["above_d", "v_d"], ["upper"]),
            node("Add", ["lower", "upper"], ["o"]),
        ],
    }


PARAMETERS: dict[str, tuple[float, int, type]] = {  # scales, zero points and their types
    "query": (0.004, 128, np.uint8),
    "key": (0.06, 0, np.int8),
    "whole": (1 / 255, 0, np.uint8),
    "fine": (1 / 8 / 31, 0, np.uint8),
    "coarse": (1 / 31, 0, np.uint8),
}


def _pair(value: str, parameters: str) -> list[Any]:
    """Return the nodes that quantize and dequantize a value."""
    scale, zero = f"{parameters}_scale", f"{parameters}_zero"
    return [
        helper.make_node("QuantizeLinear", [value, scale, zero], [f"{value}_q"]),
        helper.make_node("DequantizeLinear", [f"{value}_q", scale, zero], [f"{value}_d"]),
    ]


def _session(nodes: list[Any], inputs: list[Any], threads: int) -> tuple[Any, int]:
    """Return a session of the nodes, and the number of their products that it computes with integer kernels."""
    constants = {"split": np.float32(1 / 8), "zero": np.float32(0)}
    for name, (scale, zero, kind) in PARAMETERS.items():
        constants |= {f"{name}_scale": np.float32(scale), f"{name}_zero": kind(zero)}
    used = {name for node in nodes for name in node.input}
    initializers = [
        numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items() if name in used
    ]
    arguments = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in zip("qkv", inputs, strict=True)
    ]
    result = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "attention", arguments, [result], initializers)
    imports = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    with TemporaryDirectory() as folder:
        settings.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        ops = Counter(node.op_type for node in onnx.load(settings.optimized_model_filepath).graph.node)
    return session, ops[KERNEL]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime; default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="of all forms in turn; default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
