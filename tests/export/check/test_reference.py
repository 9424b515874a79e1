"""References in float64: every legal rounding of a site is near one, every fault is far from all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from qcgraph.export.check import parity
from qcgraph.export.check.reference import Perturbed, Shadowed, SiteReference
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import QuantizedSite, quantized_sites, record
from qcgraph.pipeline import Pipeline

SITE = "blocks.1.mlp.fc1"


@dataclass(frozen=True)
class Probe:
    """A 16-bit site, what enters and leaves it in the program, and its constants by the end of their names."""

    reference: SiteReference
    inputs: Mapping[str, torch.Tensor]
    entering: torch.Tensor
    leaving: torch.Tensor
    constants: Mapping[str, torch.Tensor]

    def margin(self, found: torch.Tensor) -> parity._Margin:
        return parity._site_margin(self.reference, self.inputs, self.entering, self.leaving, found)


@pytest.fixture(scope="module")
def reduced(constant_scales: Program) -> Program:
    return Pipeline.parse("plan-precision{dtype=float16},reduce-precision").run(constant_scales)


@pytest.fixture(scope="module")
def inputs(reduced: Program) -> dict[str, torch.Tensor]:
    return parity._inputs(reduced, "full", 0, 3, np.random.default_rng(0))


@pytest.fixture(scope="module")
def probe(reduced: Program, inputs: dict[str, torch.Tensor]) -> Probe:
    (site,) = (found for found in quantized_sites(reduced, "full") if found.name == SITE)
    ((_, values),) = record(reduced, "full", inputs, [{site.entering, site.leaving}])
    entering, leaving = (torch.from_numpy(values[name]) for name in (site.entering, site.leaving))
    constants = {name.rpartition(f"{SITE}.")[2]: value for name, value in reduced.constants.items() if SITE in name}
    return Probe(SiteReference(reduced, "full", site), inputs, entering, leaving, constants | _bias(reduced, site))


def _bias(program: Program, site: QuantizedSite) -> dict[str, torch.Tensor]:
    (node,) = (node for node in program.variants["full"].graph.nodes if node.name == site.leaving)
    return {"bias": program.constants[str(node.all_input_nodes[1].target)]}


def evaluated(
    probe: Probe, *, rounds_values: bool = True, rounds_quotients: bool = False, sums: torch.dtype = torch.float32
) -> torch.Tensor:
    """The site as a runtime may compute it: with more or fewer roundings than the program."""
    tensors, group = probe.constants, int(probe.inputs["group"])
    inverse, ratio = (tensors[f"input_scale_{name}_f16"][group].float() for name in ("inverse", "ratio"))
    scale = tensors["input_scale_reference_f16"].float()
    values = probe.entering.float() * inverse
    quotients = (values.half().float() if rounds_values else values) / scale
    codes = (quotients.half().float() if rounds_quotients else quotients).round().clamp(-32, 31)
    factors = tensors["weight_codes_t"].float() * tensors["weight_scale_f16"].float()
    activations, total = (codes * scale).to(sums), torch.zeros(1, dtype=sums)
    for position, row in enumerate(factors.to(sums)):
        total = total + activations[..., position, None] * row
    return (total.float() * ratio + tensors["bias"].float()).half()


@pytest.mark.parametrize("sums", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rounds_quotients", [True, False])
@pytest.mark.parametrize("rounds_values", [True, False])
def test_every_legal_rounding_passes(
    probe: Probe, rounds_values: bool, rounds_quotients: bool, sums: torch.dtype
) -> None:
    found = evaluated(probe, rounds_values=rounds_values, rounds_quotients=rounds_quotients, sums=sums)
    margin = probe.margin(found)
    assert not margin.exceeded
    assert margin.limit < 4e-3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight_scale_f16", lambda values: values * 1.01),
        ("weight_codes_t", lambda values: values.roll(1, 1)),
        ("weight_codes_t", lambda values: values.t().reshape(values.shape)),
        ("input_scale_ratio_f16", lambda values: values.roll(1)),
        ("input_scale_inverse_f16", lambda values: values.roll(1)),
        ("bias", lambda values: values + 0.02),
    ],
)
def test_every_fault_is_found(probe: Probe, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    faulty = replace(probe, constants=dict(probe.constants) | {name: change(probe.constants[name])})
    assert probe.margin(evaluated(faulty)).exceeded


def test_codes_on_an_edge_may_fall_to_either_side(captured: Program) -> None:
    """In float32: a value a rounding away from the edge, divided or multiplied by the reciprocal."""
    quantize = "calibrate{trajectories=1},group-timesteps{groups=1},plan-quant,insert-qdq,lower-linear"
    program = Pipeline.parse(quantize).run(captured)
    (site,) = (found for found in quantized_sites(program, "main") if found.name == SITE)
    reference = SiteReference(program, "main", site)
    scale = program.constants[f"{SITE}.input_scale"].reshape(-1)[0]
    values = (torch.arange(32 * 4).reshape(1, 4, 32) % 50 - 20) * scale
    inside, inputs = next(reference.legal_results(values, {"group": torch.tensor(0)})), {"group": torch.tensor(0)}
    assert not inside.edges.any()
    values[0, 1, 3] = 6.5 * scale
    edge = next(reference.legal_results(values, inputs))
    above = values.clone()
    above[0, 1, 3] = 6.5 * scale * (1 + 1e-4)
    below = values.clone()
    below[0, 1, 3] = 6.5 * scale * (1 - 1e-4)
    ends = [next(reference.legal_results(end, inputs)).result for end in (above, below)]
    flip = (ends[0] - ends[1]).norm()
    torch.testing.assert_close(edge.edges.norm().double(), flip, rtol=1e-5, atol=0)


def test_the_shadow_has_the_codes_of_the_program(reduced: Program, inputs: dict[str, torch.Tensor]) -> None:
    """So it differs by roundings alone; and what is perturbed by nothing is the same to the last bit."""
    shadowed = Shadowed(reduced, "full")
    found, exact = shadowed.outputs(inputs)
    expected = reduced.run("full", inputs)
    assert len(shadowed.rounding) == 8
    assert all(0 < rounding < 1e-2 for rounding in shadowed.rounding.values())
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert exact[name].dtype == torch.float64
        assert 0 < float((exact[name] - value).norm() / value.norm()) < 5e-3
    nearby = Perturbed(reduced, "full", shadowed.rounding, torch.Generator().manual_seed(0)).outputs(inputs)
    distances = {name: float((nearby[name] - value).norm() / value.norm()) for name, value in expected.items()}
    assert all(1e-3 < distance < 0.1 for distance in distances.values())
