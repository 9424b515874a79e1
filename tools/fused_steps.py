"""Show the kernels that TensorRT-RTX fuses a denoiser to, for the scales of qcgraph and for other forms, without a GPU.

    python tools/fused_steps.py digits dit-s-2:random dit-xl-2:random

Every form is the same model as graphs, built ahead of time for each compute capability. The tool counts the kernels of
a forward pass of the computing variant, and those that compute a part of a block, by block.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qcgraph.benchmark.machine import read_machine, versions
from qcgraph.bundle.engines import Batch
from qcgraph.bundle.manifest import PACKAGES
from qcgraph.capture.capture import capture
from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.export.targets import TARGETS
from qcgraph.export.tensorrt import provider as tensorrt
from qcgraph.export.tensorrt.engines import quantized_products
from qcgraph.export.tensorrt.steps import PROBED_VERSIONS, fused_steps
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_blocks
from qcgraph.models import load_model
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.progress import Progress

TARGET = TARGETS["tensorrt-rtx"]
STEPS, GUIDANCE, GROUPS = 4, 1.5, 3
CACHED = "plan-cache{interval=2},insert-cache"
QUANTIZED = (
    "calibrate{trajectories=2 latents=8},group-timesteps{groups=%d},plan-quant{symmetric=true},insert-qdq,lower-linear"
)
FLOAT8 = (QUANTIZED % GROUPS).replace("symmetric=true", "format=fp8")
REDUCED = "plan-precision{dtype=float16 trajectories=1},reduce-precision"
RUNTIME = "runtime scales"
BATCH = Batch(minimum=2, optimum=2, maximum=16)
COLUMNS = ("model", "form", "device", "steps", "a block", "8-bit GEMMs", "of", "fused attention", "of", "MB", "seconds")


@dataclass(frozen=True)
class Form:
    """A way to write scales, and the passes that produce it."""

    name: str
    passes: tuple[str, ...]


FORMS = (
    Form("float32", (CACHED,)),
    Form("float16", (CACHED, REDUCED)),
    Form("ours in float32", (CACHED, QUANTIZED % GROUPS, "reference-scales")),
    Form("ours", (CACHED, QUANTIZED % GROUPS, "reference-scales", REDUCED)),
    Form("ours in fp8", (CACHED, FLOAT8, "reference-scales", REDUCED)),
    Form("constant scales", (CACHED, QUANTIZED % 1, "reference-scales", REDUCED)),
    Form(RUNTIME, (CACHED, QUANTIZED % GROUPS, REDUCED)),
)


@dataclass(frozen=True)
class Row:
    """The kernels of one form; ``problem`` if it could not be built."""

    model: str
    form: str
    device: str
    blocks: int
    steps: int | None = None
    block_steps: int | None = None
    quantized_gemms: int | None = None
    planned: int | None = None
    fused_attention: int | None = None
    attentions: int | None = None
    megabytes: float | None = None
    seconds: float | None = None
    problem: str | None = None


def main() -> int:
    """Build all forms, and print the results."""
    options = parse()
    module = tensorrt.load_provider("tensorrt-rtx")
    if not module.__version__.startswith(PROBED_VERSIONS):
        print(f"steps are only known of TensorRT-RTX {', '.join(PROBED_VERSIONS)}", file=sys.stderr)
        return 2
    rows = [row for model in options.models for row in rows_of(model, options, module)]
    document = {
        "kind": "fused-steps",
        "format": 1,
        "machine": asdict(read_machine()),
        "versions": versions((*PACKAGES, "tensorrt-rtx")),
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(document, indent=2) if options.json else markdown(document))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", help="see qcgraph models")
    parser.add_argument("--devices", nargs="+", default=["8.9", "12.0"], help="compute capabilities")
    parser.add_argument("--forms", nargs="+", default=[form.name for form in FORMS], help="by default all")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def rows_of(name: str, options: argparse.Namespace, module: Any) -> Iterator[Row]:
    loaded = load_model(name)
    captured = capture(loaded.module, loaded.spec, loaded.input_names)
    plan = make_step_plan("ddim", STEPS, GUIDANCE, loaded.spec.noise_schedule, captured.constants_digest)
    captured = captured.with_facts(plan)
    for form in (form for form in FORMS if form.name in options.forms):
        print(f"{name}: {form.name}", file=sys.stderr, flush=True)
        program = Pipeline.parse(",".join(form.passes)).run(captured)
        with TemporaryDirectory(prefix="qcgraph-") as folder:
            emit_onnx(program, Path(folder), TARGET.opset, Progress(), **TARGET.forms)
            graph = Path(folder) / f"{program.computing}.onnx"
            if form.name == RUNTIME:
                drop_zero_points(graph)
            for device in options.devices:
                yield row_of(name, form, device, program, graph, module)


def drop_zero_points(graph: Path) -> None:
    """Remove zero points, all of which are 0: TensorRT refuses selected zero points, but not selected scales."""
    import onnx
    import onnx_graphsurgeon as gs

    imported = gs.import_onnx(onnx.load(graph, load_external_data=False))
    for node in imported.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            node.inputs = node.inputs[:2]
    onnx.save(gs.export_onnx(imported.cleanup()), graph)


def row_of(name: str, form: Form, device: str, program: Program, graph: Path, module: Any) -> Row:
    """Build one engine, and return its row."""
    import onnx

    variant = program.variants[program.computing]
    paths = [block.path for block in find_blocks(variant)]
    inside = {
        node.name
        for node in onnx.load(graph, load_external_data=False).graph.node
        if any(f"{node.name.split('/')[0]}.".startswith(f"{path}.") for path in paths)
    }
    count, attentions = len(paths), sum("attention" in str(node.target) for node in variant.graph.nodes)
    start = time.perf_counter()
    try:
        built = tensorrt.build(module, graph, variant.interface, BATCH, device)
    except Exception as error:  # noqa: BLE001 - a form that cannot be built is a result
        return Row(name, form.name, device, count, problem=str(error).split(": ")[-1])
    fused = fused_steps(built.engine)
    assert fused is not None
    return Row(
        name,
        form.name,
        device,
        count,
        steps=len(fused.steps),
        block_steps=sum(not inside.isdisjoint(step.layers) for step in fused.steps),
        quantized_gemms=fused.quantized_gemms,
        planned=len(quantized_products(graph)),
        fused_attention=fused.fused_attention,
        attentions=attentions,
        megabytes=round(built.engine.nbytes / 1e6, 1),
        seconds=round(time.perf_counter() - start, 1),
    )


def markdown(result: dict[str, Any]) -> str:
    """Return the rows as a table."""
    rows = [texts(Row(**row)) for row in result["rows"]]
    lines = [" | ".join(map(str, cells)) for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    what = (
        "Kernels of a pass of the computing variant with the cache of all blocks, in all and for each block; products "
        "that stay in 8 bits, of those that are quantized; attentions that are one kernel. Engines are built without a "
        "GPU: this says nothing about time."
    )
    return "\n".join([what, "", *(f"| {line} |" for line in lines)])


def texts(row: Row) -> tuple[object, ...]:
    first = (row.model, row.form, f"SM{row.device.replace('.', '')}")
    if row.problem is not None:
        return (*first, row.problem, *[""] * (len(COLUMNS) - 4))
    assert row.block_steps is not None
    figures = (row.quantized_gemms, row.planned, row.fused_attention, row.attentions, row.megabytes, row.seconds)
    return (*first, row.steps, f"{row.block_steps / row.blocks:.1f}", *figures)


if __name__ == "__main__":
    sys.exit(main())
