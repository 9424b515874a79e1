"""Sites are cut out of exported graphs where the fact of quantized sites says, whatever the exporter left out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import fx

from qcgraph.errors import VerificationError
from qcgraph.export.check import parity
from qcgraph.export.check.exported_sites import CutSites
from qcgraph.export.onnx.annotate import NAMESPACE
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import quantized_sites, record
from qcgraph.pipeline import Pipeline

pytestmark = pytest.mark.slow  # many captures and exports, each short
aten = torch.ops.aten
QUANTIZE = "calibrate{trajectories=1},group-timesteps{groups=2},plan-quant{pair-high=128},insert-qdq,lower-linear"
Edit = Callable[[GraphEditor, fx.Node], fx.Node]
# What exporters leave out, in front of a linear layer; the value that enters it is then that of an earlier node.
NOTHING: dict[str, Edit] = {
    "alias": lambda editor, value: editor.call(aten.alias.default, value, source=value),
    "same type": lambda editor, value: editor.call(aten.to.dtype, value, torch.float32, source=value),
    "plus 0": lambda editor, value: editor.call(aten.add.Tensor, value, 0, source=value),
    "all of it": lambda editor, value: editor.call(aten.slice.Tensor, value, 1, 0, 10**6, source=value),
}


def cut_as_computed(program: Program, variant: str, path: Path) -> None:
    """Cut all sites of a graph, feed them what enters them in the program, and compare what leaves them."""
    sites = quantized_sites(program, variant)
    assert len(sites) == 8
    cut = CutSites(program, variant, path, sites)
    inputs = parity._inputs(program, variant, 0, 2, np.random.default_rng(0))
    ((_, values),) = record(program, variant, inputs, [cut.nodes])
    found = cut.run(values, {name: inputs[name].numpy() for name in ("group", "row")})
    assert set(found) == {site.name for site in sites}
    for site in sites:
        assert float(np.abs(values[site.leaving]).max()) > 0
        np.testing.assert_allclose(found[site.name], values[site.leaving], rtol=1e-4, atol=1e-5)


def test_every_site_computes_what_it_does_in_the_program(compiled: Any, dequantizing: Any) -> None:
    for export in (compiled, dequantizing):
        cut_as_computed(export.program, "full", export.folder / "full.onnx")


@pytest.mark.parametrize("left_out", NOTHING)
def test_what_the_exporter_leaves_out_is_no_obstacle(
    captured: Program, export_of: Callable[..., Any], tmp_path: Path, left_out: str
) -> None:
    editor = GraphEditor(captured.variants["main"], captured.constants, "test")
    for linear in [node for node in editor.graph.nodes if node.target is aten.linear.default]:
        value = linear.args[0]
        assert isinstance(value, fx.Node)
        with editor.before(linear):
            linear.args = (NOTHING[left_out](editor, value), *linear.args[1:])
    program = Pipeline.parse(QUANTIZE).run(with_edits(captured, {"main": editor}))
    export_of(program, tmp_path)
    graph = onnx.load(str(tmp_path / "main.onnx"), load_external_data=False).graph
    made = {name for node in graph.node for name in node.output}
    assert not made.intersection(site.entering for site in quantized_sites(program, "main"))
    cut_as_computed(program, "main", tmp_path / "main.onnx")


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def _say_nothing(graph: onnx.GraphProto, quantizer: str) -> None:
    for node in graph.node:
        for entry in node.metadata_props:
            if entry.key == NAMESPACE and entry.value.rpartition("/")[2] == quantizer:
                entry.value = ""


@pytest.mark.parametrize("change", ["result", "codes", "place"])
def test_a_site_that_is_not_there_as_emitted_is_refused(compiled: Any, tmp_path: Path, change: str) -> None:
    site, *_ = quantized_sites(compiled.program, "full")
    path = Path(shutil.copytree(compiled.folder, tmp_path / "copy")) / "full.onnx"
    model = onnx.load(str(path), load_external_data=False)
    if change == "place":
        _say_nothing(model.graph, site.quantizer)
    else:
        _rename(model.graph, site.leaving if change == "result" else site.codes, "other")
        for tensor in model.graph.initializer:
            tensor.name = "other" if tensor.name == site.codes and change == "codes" else tensor.name
    onnx.save(model, str(path))
    with pytest.raises(VerificationError, match="no product of a quantized activation") as caught:
        CutSites(compiled.program, "full", path, [site])
    assert caught.value.where == f"full.onnx, {site.name}"
