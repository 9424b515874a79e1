"""The gates of TensorRT, checked without a GPU: it reads graphs, builds engines, and fuses the expected nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcgraph.errors import QcgraphError
from qcgraph.export.check.check import NO_NUMBER, Check
from qcgraph.export.onnx.valid import load_graph
from qcgraph.export.tensorrt import provider as tensorrt
from qcgraph.export.tensorrt.engines import batch_for, default_batch, quantized_products
from qcgraph.export.tensorrt.steps import PROBED_VERSIONS, FusedSteps, fused_steps
from qcgraph.facts import QuantPlan
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import quantized_sites
from qcgraph.ir.structure import find_sites
from qcgraph.plan.spec import Interface
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress

COMPUTE_CAPABILITIES = ("8.9", "12.0")  # targets of builds, if the library builds ahead of time
ATTENTION = ("Attention", "Softmax")  # every attention has one of these nodes, whether it is whole or in parts
CONTROL = ("If", "Loop", "Scan")
BUILT, PRODUCTS, FUSED, JUMPS = "engines", "8-bit products", "fused attention", "conditional jumps"
PROBED = (PRODUCTS, FUSED, JUMPS)  # checks that read the steps of engines


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX.

    Attributes:
        title: the usual name of the library.
        module: the Python module.
    """

    title: str
    module: Any

    @classmethod
    def load(cls, name: str) -> Library:
        """Load a library by the name of its target.

        Raises:
            UsageError: the library is not installed, or cannot be loaded here.
        """
        module = tensorrt.load_provider(name)
        return cls(tensorrt.LIBRARIES[name].title, module)

    @property
    def version(self) -> str:
        """The name and the version of the library."""
        return f"{self.title} {self.module.__version__}"

    @property
    def is_probed(self) -> bool:
        """Whether the steps of its engines can be read (see `qcgraph.export.tensorrt.steps`)."""
        return str(self.module.__version__).startswith(PROBED_VERSIONS)


@dataclass(frozen=True)
class Expected:
    """The fusions that are expected in the engines of a graph.

    Attributes:
        products: the node of every quantized product -> its name in messages.
        absent: linears that are planned to be quantized and are not among these products.
        attentions: the node of every attention -> its name in messages.
        branches: the nodes that choose between graphs or repeat one.
        is_half: whether any weight has 16 bits; TensorRT has no fused attention in float32.
    """

    products: Mapping[str, str]
    absent: tuple[str, ...]
    attentions: Mapping[str, str]
    branches: tuple[str, ...]
    is_half: bool


def check_engine(
    library: Library, program: Program, variant: str, path: Path, interface: Interface, progress: Progress
) -> Iterator[Check]:
    """Check that TensorRT reads a graph, strongly typed, builds engines of it, and fuses the expected nodes.

    Args:
        library: the library that reads and builds.
        program: the exported program, which holds a step plan; the plan decides on the batches.
        variant: the variant of the graph.
        path: the graph, which is valid ONNX.
        interface: the inputs and outputs of the variant.
        progress: reports the builds.
    """
    reading = f"read by {library.title}"
    if problems := tensorrt.problems(library.module, path):
        lines = tensorrt.refusal({path.name: problems}).message.splitlines()
        detail = "; ".join(line.strip() for line in lines)
        yield Check(reading, variant, passed=False, value=len(problems), limit=0, detail=detail)
        return
    yield Check(reading, variant, passed=True, value=0, limit=0, detail="every node, strongly typed")
    plan, offered = program.facts[StepPlan], tensorrt.compute_capabilities(library.module)
    batch = batch_for(variant, default_batch(plan), plan)
    engines: dict[str, FusedSteps | None] = {}
    refused: dict[str, str] = {}
    for capability in (capability for capability in COMPUTE_CAPABILITIES if capability in offered):
        progress.note(f"building {variant} for {capability}")
        try:
            built = tensorrt.build(library.module, path, interface, batch, capability, progress)
        except QcgraphError as error:
            refused[capability] = error.message
        else:
            engines[capability] = fused_steps(built.engine) if library.is_probed else None
    yield _check_builds(library, variant, tuple(engines), refused)
    steps = {capability: fused for capability, fused in engines.items() if fused is not None}
    if steps:
        yield from check_fusion(variant, expected_of(program, variant, path), steps)
    elif engines:
        known = f"TensorRT-RTX {', '.join(PROBED_VERSIONS)}"
        reason = f"not looked at: steps cannot be read out of engines of {library.version}, as they can of {known}"
        yield from (
            Check(name, variant, passed=None, value=NO_NUMBER, limit=NO_NUMBER, detail=reason) for name in PROBED
        )


def check_fusion(variant: str, expected: Expected, engines: Mapping[str, FusedSteps]) -> Iterator[Check]:
    """Check the fusions in the engines of a variant.

    Args:
        variant: the variant.
        expected: the expected fusions.
        engines: the steps of its engines, by compute capability.
    """
    products, attentions = expected.products, expected.attentions

    def left(nodes: Mapping[str, str], fused: Callable[[FusedSteps], frozenset[str]]) -> dict[str, list[str]]:
        """Return the names of nodes that are missing from the fused ones, by compute capability."""
        found = {name: [nodes[node] for node in nodes if node not in fused(steps)] for name, steps in engines.items()}
        return {capability: names for capability, names in found.items() if names}

    not_quantized = left(products, lambda steps: steps.quantized_layers)
    if expected.absent:
        not_quantized = {"every GPU": list(expected.absent)} | not_quantized
    counts = " and ".join(sorted({str(steps.quantized_gemms) for steps in engines.values()}))
    good = f"{len(products)} quantized products in {counts} GEMMs of 8 bits" if products else "nothing is quantized"
    yield _checked(PRODUCTS, variant, not_quantized, good, "not in a product of 8 bits")
    if attentions and not expected.is_half:
        reason = (
            f"not met: TensorRT fuses attention of 16 bits only, and the graph is float32; {len(attentions)} in parts"
        )
        yield Check(FUSED, variant, passed=None, value=NO_NUMBER, limit=NO_NUMBER, detail=reason)
    else:
        parts = left(attentions, lambda steps: steps.attention_layers)
        good = f"each of {len(attentions)} is one kernel" if attentions else "there is no attention"
        yield _checked(FUSED, variant, parts, good, "in parts")
    jumps = max(steps.conditional_jumps for steps in engines.values())
    where = f" in {', '.join(expected.branches)}" if expected.branches else ""
    detail = f"{jumps} in the engine{where}: no CUDA graph can hold it" if jumps else "none"
    yield Check(JUMPS, variant, passed=not jumps, value=jumps, limit=0, detail=detail)


def expected_of(program: Program, variant: str, path: Path) -> Expected:
    """Return the expected fusions of an exported graph, with sites named as in the program."""
    from onnxscript import ir

    model = load_graph(path)
    graph, nodes = program.variants[variant], list(model.graph.all_nodes())
    quantized, plan = quantized_sites(program, variant), program.facts.get(QuantPlan)
    names = {site.node: site.name for site in find_sites(graph)}
    values = {str(node.name): str(node.outputs[0].name) for node in nodes}  # values are named as in the program
    found = quantized_products(path)
    made = {values[node] for node in found}
    multiplied = {site.name for site in quantized if site.product in made}
    planned = [site for site in names.values() if plan and site in plan.sites]
    narrow = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return Expected(
        products={node: names.get(values[node], node) for node in found},
        absent=tuple(site for site in planned if site not in multiplied),
        attentions={
            str(node.name): names.get(values[str(node.name)], str(node.name))
            for node in nodes
            if node.op_type in ATTENTION
        },
        branches=tuple(f"{node.op_type} {node.name}" for node in nodes if node.op_type in CONTROL),
        is_half=any(value.dtype in narrow for value in model.graph.initializers.values()),
    )


def _check_builds(library: Library, variant: str, built: tuple[str, ...], refused: Mapping[str, str]) -> Check:
    if not built and not refused:
        detail = f"not looked at: {library.title} builds for the GPU that is there only"
        return Check(BUILT, variant, passed=None, value=NO_NUMBER, limit=NO_NUMBER, detail=detail)
    detail = "; ".join(refused.values()) if refused else f"for {' and '.join(built)}"
    return Check(BUILT, variant, passed=not refused, value=len(refused), limit=0, detail=detail)


def _checked(name: str, variant: str, offenders: Mapping[str, list[str]], good: str, bad: str) -> Check:
    """Return a check that passes without offenders, which are given by compute capability."""
    count = len({offender for names in offenders.values() for offender in names})
    texts = [f"for {capability} {', '.join(names)}" for capability, names in offenders.items()]
    detail = f"{bad}: {'; '.join(texts)}" if texts else good
    return Check(name, variant, passed=not texts, value=count, limit=0, detail=detail)
