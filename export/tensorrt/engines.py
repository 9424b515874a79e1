"""Building a folder of engines of a bundle: one for every variant and compute capability, written in one piece."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcgraph.bundle import Bundle
from qcgraph.bundle.engines import (
    ENGINE_FOLDER,
    ENGINES,
    TIMING_CACHE,
    Batch,
    Engine,
    EngineManifest,
    device_tag,
    read_engines,
    source_of,
    write_record,
)
from qcgraph.bundle.watch import reading
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.targets import target_of
from qcgraph.export.tensorrt import provider as tensorrt
from qcgraph.export.tensorrt.steps import PROBED_VERSIONS, FusedSteps, fused_steps
from qcgraph.files.folder import read_file
from qcgraph.plan.roles import VariantKind
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.modulation import TOGETHER

SAMPLES_AT_MOST = 8  # samples that an engine takes at once by default


def build_engines(
    bundle: Bundle,
    capabilities: Sequence[str],
    output: Path | None = None,
    batch: Batch | None = None,
    *,
    provider: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> EngineManifest:
    """Build an engine for every variant of a bundle and every compute capability.

    Nothing is written before all engines are built.

    Args:
        bundle: a bundle with ONNX graphs.
        capabilities: compute capabilities of GPUs, such as ``8.9``; by default that of the GPU of this machine.
        output: the folder to write; by default ``engines`` in the bundle.
        batch: the batches that the engines take (see `batch_for`); by default one to eight samples.
        provider: a name in `qcgraph.export.tensorrt.provider.LIBRARIES`; see `default_provider`.
        force: whether existing engines are replaced.
        progress: reports the engines.

    Raises:
        UsageError: names the reason: the bundle has no ONNX graphs, TensorRT is not installed or cannot hold a graph, a
            required GPU is missing, or an option is wrong.
        BundleError: a graph does not match the plan, or the bundle was replaced while engines were built of it.
    """
    progress, place = progress or Progress(), output or bundle.path / ENGINES
    graphs = _graphs(bundle)
    provider = provider or default_provider(bundle)
    batches = {variant: batch_for(variant, batch or default_batch(bundle.plan), bundle.plan) for variant in graphs}
    module = tensorrt.load_provider(provider)
    wanted = _check_capabilities(module, capabilities, provider)
    ENGINE_FOLDER.check(place, force=force)
    _refuse_problems(module, graphs)
    ahead, timings = tensorrt.LIBRARIES[provider].builds_ahead, _earlier_timings(place)
    held = reading(bundle, bundle.manifest.files, done="built into engines")
    with ENGINE_FOLDER.writing(place, force=force) as folder, held:
        engines = []
        for variant, capability in [(variant, capability) for variant in graphs for capability in wanted]:
            progress.note(f"building {variant} for {capability}")
            interface = bundle.interfaces[variant]
            settings = (batches[variant], capability, progress, timings)
            built = tensorrt.build(module, graphs[variant], interface, *settings)
            timings = built.timing_cache or timings
            is_probed = ahead and module.__version__.startswith(PROBED_VERSIONS)
            fused = fused_steps(built.engine) if is_probed else None
            engine = _written(built, folder, variant, capability, batches[variant])
            if fused is not None:
                engine = engine.model_copy(update=_counts(fused, quantized_products(graphs[variant])))
            if engine.not_quantized:
                progress.note(f"  not multiplied in 8 bits: {', '.join(engine.not_quantized)}")
            engines.append(engine)
        if not ahead and timings:
            (folder / TIMING_CACHE).write_bytes(timings)
        write_record(folder, provider, module.__version__, source_of(bundle), tuple(engines))
    return read_engines(place)


def default_provider(bundle: Bundle) -> str:
    """Return the provider for a bundle: the runtime of its target where that is a provider, else TensorRT-RTX."""
    runtime = target_of(bundle).runtime
    return runtime if runtime in tensorrt.LIBRARIES else "tensorrt-rtx"


MOST_AT_ONCE = 2**20  # latents in a batch


def parse_batch(text: str) -> Batch:
    """Return the batches of ``MIN,OPT,MAX``.

    Raises:
        UsageError: the text is not three whole numbers, 1 <= MIN <= OPT <= MAX.
    """
    hint = "for example --batch 2,2,16: MIN, OPT and MAX, each at least the one before"
    try:
        minimum, optimum, maximum = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is not three whole numbers", where="--batch", hint=hint) from None
    if minimum < 1:
        raise UsageError(f"the smallest batch is 1, not {minimum}", where="--batch", hint=hint)
    if maximum > MOST_AT_ONCE:
        raise UsageError(f"a batch of {maximum} is too large", where="--batch", hint=f"{MOST_AT_ONCE} at most")
    if not minimum <= optimum <= maximum:
        raise UsageError(f"{text!r} does not rise", where="--batch", hint=hint)
    return Batch(minimum=minimum, optimum=optimum, maximum=maximum)


def default_batch(plan: StepPlan) -> Batch:
    """Return one sample to `SAMPLES_AT_MOST`, tuned for one; under guidance each counts twice in the batch."""
    return Batch(minimum=plan.halves, optimum=plan.halves, maximum=plan.halves * SAMPLES_AT_MOST)


def batch_for(variant: str, batch: Batch, plan: StepPlan) -> Batch:
    """Return the batches of one variant.

    A variant that prepares other variants takes many steps at once, see `qcgraph.sampling.modulation.Modulation`.

    Raises:
        UsageError: the variant takes both halves of guidance, and a batch is odd.
    """
    odd = [size for size in (batch.minimum, batch.optimum, batch.maximum) if size % 2]
    kind = plan.roles[variant].kind
    if odd and kind is VariantKind.HALF:
        raise UsageError(
            f"{variant} takes both halves of guidance in one batch, and {odd[0]} is odd",
            where="--batch",
            hint="give even numbers: two a sample",
        )
    if kind is VariantKind.PREPARES:
        most = max(TOGETHER, batch.maximum)
        return Batch(minimum=1, optimum=max(batch.optimum, min(TOGETHER, most)), maximum=most)
    return batch


def _graphs(bundle: Bundle) -> dict[str, Path]:
    names = {variant: f"{variant}.onnx" for variant in bundle.interfaces}
    if missing := [name for name in names.values() if name not in bundle.manifest.files]:
        raise UsageError(
            f"has no {missing[0]}: it was compiled for {bundle.manifest.target}",
            where=str(bundle.path),
            hint="compile it for a target with ONNX graphs (see qcgraph targets)",
        )
    return {variant: bundle.file(name) for variant, name in names.items()}


def _check_capabilities(module: Any, capabilities: Sequence[str], provider: str) -> tuple[str, ...]:
    """Return the compute capabilities to build for, each once."""
    title = tensorrt.LIBRARIES[provider].title
    offered = tuple(tensorrt.compute_capabilities(module))
    hint = f"known: {', '.join(offered)}"
    if not tensorrt.LIBRARIES[provider].builds_ahead:
        present = _present_capability(f"{title} builds for the GPU that is here", "build with --target tensorrt-rtx")
        offered, hint = (present,), f"{title} builds for the GPU that is here alone, {present}"
    wanted = capabilities or (_present_capability("none is given", hint),)
    for capability in wanted:
        if capability not in offered:
            said = f"{title} {module.__version__} does not build for {capability!r}"
            raise UsageError(said, where="--compute-capability", hint=hint)
    return tuple(dict.fromkeys(wanted))


def _present_capability(reason: str, hint: str) -> str:
    """Return the compute capability of the GPU of this machine, or raise the reason for needing one."""
    from qcgraph.export.tensorrt.device import capability_of, device_problem, require_device

    if problem := device_problem():
        raise UsageError(f"{reason}, and {problem}", where="--compute-capability", hint=hint)
    return capability_of(require_device())


def _earlier_timings(place: Path) -> bytes:
    """Return the timing cache of the existing engines, which speeds up building them again."""
    try:
        return read_file(place, TIMING_CACHE)
    except BundleError:
        return b""


def _refuse_problems(module: Any, graphs: dict[str, Path]) -> None:
    """Refuse graphs that cannot be built, all at once and before any of them is built."""
    found = {path.name: tensorrt.problems(module, path) for path in graphs.values()}
    refused = {name: problems for name, problems in found.items() if problems}
    if refused:
        raise tensorrt.refusal(refused)


def quantized_products(graph: Path) -> tuple[str, ...]:
    """Return the nodes of an ONNX graph that multiply two dequantized matrices."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    dequantized = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    products = (node for node in nodes if node.op_type in ("MatMul", "Gemm"))
    return tuple(node.name for node in products if dequantized.issuperset(node.input[:2]))


def _written(built: tensorrt.Built, folder: Path, variant: str, capability: str, batch: Batch) -> Engine:
    """Write an engine into the folder, and return its record without figures on its steps."""
    name = f"{variant}.{device_tag(capability)}.engine"
    (folder / name).write_bytes(built.engine)
    return Engine(
        variant=variant,
        file=name,
        sha256=hashlib.sha256(built.engine).hexdigest(),
        bytes=built.engine.nbytes,
        compute_capability=capability,
        batch=batch,
        seconds=round(built.seconds, 2),
        layers=built.layers,
        steps=None,
        quantized_gemms=None,
        not_quantized=None,
        fused_attention=None,
        conditional_jumps=None,
    )


def _counts(fused: FusedSteps, quantized: Sequence[str]) -> dict[str, object]:
    """Return the figures of the probe as fields of `Engine`."""
    return {
        "steps": len(fused.steps),
        "quantized_gemms": fused.quantized_gemms,
        "not_quantized": tuple(name for name in quantized if name not in fused.quantized_layers),
        "fused_attention": fused.fused_attention,
        "conditional_jumps": fused.conditional_jumps,
    }
