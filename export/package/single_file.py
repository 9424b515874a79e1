"""Export of a bundle to one ONNX model: every variant is a branch, an input chooses one, and weights are stored once.

An ``If`` runs one of its branches only, so a step costs as much as its variant. Caches are inputs and outputs; a branch
that does not compute a cached value passes it on (see `qcgraph.export.package.join`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qcgraph.bundle import Bundle
from qcgraph.errors import QcgraphError
from qcgraph.export.onnx.valid import problem_of
from qcgraph.export.package.join import join
from qcgraph.export.package.single_model import SingleModel, host_plan

if TYPE_CHECKING:
    from onnxscript import ir

MODEL = "model.onnx"
PLAN_KEY = "qcgraph.plan"  # key in the model's metadata: the plan for hosts, as JSON
LARGEST_FILE = 2**31 - 2**24  # bytes of weights in the model itself; protobuf ends at 2 GiB


def write_single_file(bundle: Bundle, folder: Path, *, largest: int = LARGEST_FILE) -> SingleModel:
    """Write ``model.onnx`` into an existing folder, and the weights beside it where the model cannot hold them.

    Args:
        bundle: a bundle with ONNX graphs.
        folder: the folder for the files.
        largest: the largest size in bytes of weights that the model itself holds.

    Raises:
        BundleError: the bundle has no ONNX graphs.
        QcgraphError: the result is not valid ONNX.
    """
    from onnxscript import ir

    single = SingleModel.of(bundle)
    model = join(bundle, single)
    model.metadata_props[PLAN_KEY] = json.dumps(host_plan(bundle, single))
    weights = [value.const_value for value in model.graph.initializers.values()]
    stored = [tensor for tensor in weights if isinstance(tensor, ir.ExternalTensor)]
    if sum(tensor.nbytes for tensor in stored) <= largest:
        ir.external_data.load_to_model(model)
    else:
        for name in {str(tensor.location) for tensor in stored}:
            shutil.copyfile(bundle.file(name), folder / name)
    _write(model, folder / MODEL)
    return single


def _write(model: ir.Model, path: Path) -> None:
    from onnxscript import ir

    ir.save(model, path)
    if problem := problem_of(path):
        reason = problem.splitlines()[0]
        raise QcgraphError(
            f"the joined graph is not valid ONNX: {reason}", where=path.name, hint="this is a bug of qcgraph"
        )
