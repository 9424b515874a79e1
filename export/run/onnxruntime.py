"""A runner of exported graphs on ONNX Runtime on the CPU. NumPy and onnxruntime only, no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcgraph.bundle import Bundle
from qcgraph.bundle.watch import reading
from qcgraph.errors import BundleError, closest
from qcgraph.export.run.runtimes import Exported
from qcgraph.export.targets import Target
from qcgraph.files.atomic import scratch_folder
from qcgraph.plan.spec import Interface
from qcgraph.sampling.cache_state import cached, depths, remember
from qcgraph.sampling.runner import Array, Call

# This fusion joins the last sum to the next norm where graphs state all shapes, and rounds otherwise than the two ops.
DISABLED_OPTIMIZERS = ["SkipLayerNormFusion"]
EXECUTION_PROVIDERS = ["CPUExecutionProvider"]
WEIGHTS = "weights.safetensors"  # the weights file of the graphs


class OnnxRuntimeRunner:
    """Runs the exported graphs of a folder (see `qcgraph.sampling.runner.Runner`).

    A graph is loaded by `load`, or at its first run. Cache tensors in a request's state are OrtValues: a computing step
    makes new ones, a reusing step reads them in place, and nothing ever writes to them again. Several threads may run
    graphs at once, each with its own state.

    Args:
        folder: the folder of ``<variant>.onnx`` and its weights.
        interfaces: inputs and outputs by variant.
        threads: the number of threads that a graph may use; all cores when None.
        constants: values that replace those of the same names in the weights file.
        exact: see `session_options`.
        check: called before every run; raises an error where the weights file, which sessions map into memory, has
            changed.
    """

    def __init__(
        self,
        folder: Path,
        interfaces: Mapping[str, Interface],
        threads: int | None = None,
        constants: Mapping[str, npt.NDArray[np.generic]] | None = None,
        *,
        exact: bool = False,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._folder = folder
        self._interfaces = interfaces
        self._threads = threads
        self._exact = exact
        self._depths = depths(interfaces.values())
        # Sessions read the values in place, so the values have to live as long as the sessions do.
        self._constants = {name: _ort_value(value) for name, value in (constants or {}).items()}
        self._check = check
        self._sessions: dict[str, Any] = {}
        self._loading = threading.Lock()

    def load(self) -> None:
        """Load every graph now, so that later changes to their files have no effect.

        Raises:
            BundleError: a graph cannot be loaded.
        """
        for variant in self._interfaces:
            self._session(variant)

    def run(self, call: Call) -> Array:
        """Run one variant.

        Raises:
            BundleError: there is no such variant, its graph cannot be loaded, or it reuses a value that was never
                computed.
        """
        outputs = self.run_outputs(call.variant, call.inputs, call.state)
        interface = self._interfaces[call.variant]
        result: Array = outputs[interface.result.name].numpy()
        remember(call.state, {spec.value: outputs[spec.name] for spec in interface.caches}, self._depths)
        return result

    def run_outputs(
        self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: Mapping[tuple[str, int], object]
    ) -> dict[str, Any]:
        """Return all outputs of one variant as OrtValues by name; inputs that ``inputs`` lacks come from ``state``."""
        session = self._session(variant)
        if self._check is not None:
            self._check()
        interface = self._interfaces[variant]
        binding = session.io_binding()
        given = {name: np.asarray(inputs[name], order="C") for name in interface.input_names if name in inputs}
        for spec in interface.inputs:
            if spec.name in given:
                binding.bind_cpu_input(spec.name, given[spec.name])  # reads the array in place; `given` keeps it alive
            else:
                binding.bind_ortvalue_input(spec.name, cached(spec, variant, state))
        for name in interface.output_names:
            binding.bind_output(name)  # into memory that ONNX Runtime allocates for this call
        session.run_with_iobinding(binding)
        return dict(zip(interface.output_names, binding.get_outputs(), strict=True))

    def _session(self, variant: str) -> Any:
        if variant not in self._interfaces:
            known = closest(variant, self._interfaces)
            raise BundleError(f"no variant {variant!r}", where=str(self._folder), hint=known)
        with self._loading:
            if variant not in self._sessions:
                options = session_options(self._threads, exact=self._exact)
                for name, value in self._constants.items():
                    options.add_initializer(name, value)
                self._sessions[variant] = load_session(self._folder / f"{variant}.onnx", options)
            return self._sessions[variant]


def open_bundle(target: Target, bundle: Bundle, threads: int | None) -> OnnxRuntimeRunner:
    """Return a runner on the graphs of a bundle, all of them loaded.

    Raises:
        BundleError: the bundle has no graphs, one cannot be loaded, or the bundle was replaced meanwhile.
    """
    graphs = [f"{variant}.onnx" for variant in bundle.interfaces]
    missing = [name for name in graphs if name not in bundle.manifest.files]
    if missing:
        raise BundleError(
            f"the bundle has no {missing[0]}: it was compiled for target {bundle.manifest.target!r}",
            where=str(bundle.path),
            hint="use --backend torch, or compile with --target onnxruntime-cpu",
        )
    with reading(bundle, [*graphs, WEIGHTS]) as files:
        check = files[WEIGHTS].check if WEIGHTS in files else None
        runner = OnnxRuntimeRunner(bundle.path, bundle.interfaces, threads, exact=target.may_saturate, check=check)
        runner.load()
    return runner


def open_exported(target: Target, exported: Exported, threads: int | None) -> OnnxRuntimeRunner:
    """Return a runner on the graphs of a program in a folder."""
    return OnnxRuntimeRunner(
        exported.folder, exported.interfaces, threads, exported.constants, exact=target.may_saturate
    )


@dataclass(frozen=True)
class OptimizedNode:
    """One node of an optimized graph."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OptimizedGraph:
    """A graph after ONNX Runtime's optimization at loading.

    Attributes:
        nodes: the nodes of the graph, in an order they can run in.
    """

    nodes: tuple[OptimizedNode, ...]

    @classmethod
    def of(cls, path: Path) -> OptimizedGraph:
        """Return the optimized form of an exported graph.

        Raises:
            BundleError: ONNX Runtime cannot load the graph.
        """
        import onnx

        with scratch_folder() as folder:
            optimized = folder / "optimized.onnx"
            options = session_options(None)
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry("session.disable_prepacking", "1")  # the session is never run
            # Weights beside the graph, because a graph file cannot hold more than 2 GiB.
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
            load_session(path, options)
            proto = onnx.load(str(optimized), load_external_data=False)
        nodes = (
            OptimizedNode(node.op_type, node.name, tuple(node.input), tuple(node.output)) for node in proto.graph.node
        )
        return cls(tuple(nodes))

    def count(self, op: str) -> int:
        """Return the number of nodes with this op."""
        return sum(node.op == op for node in self.nodes)


def session_options(threads: int | None, *, exact: bool = False) -> Any:
    """Return the options that every session is loaded with.

    Args:
        threads: the number of threads that a graph may use; all cores when None.
        exact: whether codes of which two products exceed 16 bits are multiplied exactly on CPUs without VNNI, too (see
            `qcgraph.export.targets.Target`). This takes about a sixth longer, on every CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; warnings are about sound graphs
    if threads is not None:
        options.intra_op_num_threads = threads
    # The variants take turns: spinning threads of a waiting variant would take the cores of the running one. (On two
    # cores, a computing step that takes turns with a reusing one then takes 1.7 times as long.)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _ort_value(array: npt.NDArray[np.generic]) -> Any:
    """Return an array in the form of ONNX Runtime."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def load_session(model: Path | bytes, options: Any) -> Any:
    """Return a session of a graph file, or of a graph in memory.

    Raises:
        BundleError: ONNX Runtime cannot load the graph.
    """
    import onnxruntime

    source = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(
            source, options, providers=EXECUTION_PROVIDERS, disabled_optimizers=DISABLED_OPTIMIZERS
        )
    except Exception as error:  # ONNX Runtime's exceptions share no other base class
        raise BundleError(
            f"ONNX Runtime cannot load the graph: {str(error).splitlines()[0]}",
            where=model.name if isinstance(model, Path) else None,
            hint="run qcgraph verify on the bundle; it may be incomplete, or made for a newer ONNX Runtime",
        ) from error
