"""Export of a bundle to a model of NVIDIA's Triton Inference Server, which keeps the caches of every request.

Triton's implicit state belongs to one model, and an ensemble is a fixed graph of models that cannot choose between
two. So all variants are one model (see `qcgraph.export.package.single_file`), the client sends the variant to run, and
the caches are the state: the output of a step is the input of the next step of the same sequence. A sequence is one
trajectory. Its batch is a dimension of the tensors: Triton's own batching takes one row from each sequence, and rows of
one batch would have to be at the same step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from qcgraph.bundle import Bundle
from qcgraph.export.package.single_file import PLAN_KEY, write_single_file
from qcgraph.export.package.single_model import START, HostedCache, SingleModel, host_plan
from qcgraph.export.targets import target_of
from qcgraph.plan.spec import TensorSpec

CONFIG = "config.pbtxt"
VERSION = "1"  # Triton's version of the model, which is a folder
SEQUENCES = 32  # number of simultaneous trajectories; further ones wait for one to end
IDLE_SECONDS = 60  # time after which an idle trajectory gives up its place
_TYPES = {"bf16": "TYPE_BF16", "bool": "TYPE_BOOL", "f16": "TYPE_FP16", "f32": "TYPE_FP32", "i64": "TYPE_INT64"}


def write_triton(bundle: Bundle, folder: Path) -> SingleModel:
    """Write ``config.pbtxt`` and ``1/model.onnx`` into an existing folder, which is one of a model repository.

    Raises:
        BundleError: the bundle has no ONNX graphs.
        QcgraphError: the result is not valid ONNX.
    """
    (folder / VERSION).mkdir()
    single = write_single_file(bundle, folder / VERSION)
    (folder / CONFIG).write_text(config_text(bundle, single), "utf-8")
    return single


def config_text(bundle: Bundle, single: SingleModel) -> str:
    """Return the configuration of the model, as protobuf text of Triton's ``ModelConfig``.

    The configuration has no name: Triton names the model after its folder. A client reads the plan for the host from
    the parameters.
    """
    parts = ['backend: "onnxruntime"', "max_batch_size: 0"]
    parts += [f"input {_tensor(spec)}" for spec in single.inputs if spec.name != START]
    parts.append(f"output {_tensor(single.output)}")
    if single.cache:
        parts.append(_sequences(single))
    if target_of(bundle).integer_products:  # ONNX Runtime has kernels for them on the CPU
        parts.append("instance_group { count: 1 kind: KIND_CPU }")
    plan = json.dumps(
        json.dumps(host_plan(bundle, single))
    )  # once more: ASCII, quoted and escaped as protobuf wants it
    parts.append(f'parameters {{\n  key: "{PLAN_KEY}"\n  value {{ string_value: {plan} }}\n}}')
    return "\n".join(parts) + "\n"


def _tensor(spec: TensorSpec) -> str:
    return f'{{ name: "{spec.name}" data_type: {_TYPES[spec.dtype]} dims: {_dims(spec, -1)} }}'


def _dims(spec: TensorSpec, batch: int) -> str:
    return f"[ {', '.join(str(batch if isinstance(dim, str) else dim) for dim in spec.shape)} ]"


def _sequences(single: SingleModel) -> str:
    """Return the configuration of sequences: their number and their state."""
    lines = [f"max_sequence_idle_microseconds: {IDLE_SECONDS * 10**6}"]
    # Oldest, not direct: an instance then serves many sequences in turn, instead of one until its end.
    lines.append(f"oldest {{ max_candidate_sequences: {SEQUENCES} }}")
    if START in single.numbers:
        control = "control { kind: CONTROL_SEQUENCE_START bool_false_true: [ false, true ] }"
        lines.append(f'control_input {{ name: "{START}" {control} }}')
    for item in single.cache:
        lines += ["state {", *_indented(_state(item)), "}"]
    return "\n".join(["sequence_batching {", *_indented(lines), "}"])


def _state(item: HostedCache) -> list[str]:
    kind = _TYPES[item.spec.dtype]
    start = f'{{ name: "zero" data_type: {kind} dims: {_dims(item.spec, 1)} zero_data: true }}'
    return [
        f'input_name: "{item.taken.name}"',
        f'output_name: "{item.given.name}"',
        f"data_type: {kind}",
        f"dims: {_dims(item.spec, -1)}",
        f"initial_state {start}",  # never read: the first step computes
    ]


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
