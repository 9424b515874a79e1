"""equalize: move the differences between the channels of activations into the weights, as planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from qcgraph.errors import ContractError
from qcgraph.facts import CalibrationSet, Equalization, EqualizationPlan, EqualizedActivation, Ranges
from qcgraph.ir.graph import copy_graph
from qcgraph.ir.program import Program
from qcgraph.passes.quantization._equalizable import EqualizableActivation, equalizable_activations, only_graph
from qcgraph.pipeline import Pass, PassContext

PLAN_AGAIN = "run plan-equalization on the program as it is, and equalize once"


@dataclass(frozen=True)
class Equalize(Pass):
    """Divide the channels of activations by the planned factors, and multiply the weights by them.

    With x' = (x - o) / s, W' = W * s and b' = b + W * o the result of a linear layer is unchanged (see
    `plan-equalization`). Dividing costs nothing, because it is done in the rows and biases of the layers that make the
    activation.
    """

    name: ClassVar[str] = "equalize"
    requires: ClassVar[tuple[type, ...]] = (EqualizationPlan,)
    precedes: ClassVar[tuple[type, ...]] = (Ranges, CalibrationSet)
    provides: ClassVar[tuple[type, ...]] = (Equalization,)
    restarts: ClassVar[bool] = True

    def run(self, program: Program, context: PassContext) -> Program:
        refusals: dict[str, str] = {}
        found = tuple(equalizable_activations(only_graph(program, self.name), refusals.__setitem__))
        constants = dict(program.constants)
        inputs: dict[str, tuple[float, ...]] = {}
        divided: dict[str, torch.Tensor] = {}
        site_of = {weight: site for item in found for site, (weight, _) in zip(item.sites, item.readers, strict=True)}
        for planned in program.facts[EqualizationPlan].activations:
            item = _planned_activation(planned, found, refusals, constants)
            factors = torch.tensor(planned.factors)
            _move(constants, item, torch.tensor(planned.offsets), factors)
            inputs |= dict.fromkeys(item.sites, planned.factors)
            for rows in item.makers:
                if rows.weight in site_of:
                    known = divided.setdefault(site_of[rows.weight], torch.ones(len(constants[rows.weight])))
                    known[list(rows.rows)] = factors
        outputs = {site: tuple(factors.tolist()) for site, factors in divided.items()}
        # Graphs are copied, because they refer to the module that ran them, which holds the replaced weights.
        variants = {name: replace(item, graph=copy_graph(item.graph)) for name, item in program.variants.items()}
        earlier = program.facts.get(Equalization) or Equalization({}, {})
        made = Equalization(_multiplied(earlier.inputs, inputs), _multiplied(earlier.outputs, outputs))
        served = program.facts.without(EqualizationPlan)
        return replace(program, variants=variants, constants=constants, facts=served.with_(made))


def _planned_activation(
    planned: EqualizedActivation,
    found: tuple[EqualizableActivation, ...],
    refusals: Mapping[str, str],
    constants: Mapping[str, torch.Tensor],
) -> EqualizableActivation:
    """Return the activation of the program that a plan names.

    Raises:
        ContractError: the program has no such activation.
    """
    site = planned.sites[0]
    item = next((item for item in found if site in item.sites), None)
    if item is None:
        reason = refusals.get(site, "the program has no such site that can be quantized")
        raise ContractError(f"is planned to be equalized and cannot be: {reason}", where=site, hint=PLAN_AGAIN)
    if item.sites != planned.sites:
        expected, readers = (", ".join(sites) for sites in (planned.sites, item.sites))
        raise ContractError(
            f"its activation is planned to enter {expected}, and enters {readers}", where=site, hint=PLAN_AGAIN
        )
    channels = constants[item.readers[0][0]].shape[1]
    if {len(planned.offsets), len(planned.factors)} != {channels}:
        counts = f"{len(planned.offsets)} offsets and {len(planned.factors)} factors"
        raise ContractError(f"is planned with {counts}, and has {channels} channels", where=site, hint=PLAN_AGAIN)
    return item


def _move(
    constants: dict[str, torch.Tensor], item: EqualizableActivation, offset: torch.Tensor, factors: torch.Tensor
) -> None:
    """Replace the constants of the layers that make or read an activation x, so that (x - offset) / factors is made."""
    for rows in item.makers:
        index = torch.tensor(rows.rows)
        weight, bias = constants[rows.weight].clone(), constants[rows.bias].clone()
        weight[index] /= factors[:, None]
        # A gain is 1 + bias, so after the division the bias is the quotient less 1.
        bias[index] = (bias[index] - (factors - 1 if rows.is_gain else offset)) / factors
        constants[rows.weight], constants[rows.bias] = weight, bias
    for weight_name, bias_name in item.readers:
        constants[bias_name] = constants[bias_name] + constants[weight_name] @ offset
        constants[weight_name] = constants[weight_name] * factors


def _multiplied(
    earlier: Mapping[str, tuple[float, ...]], later: Mapping[str, tuple[float, ...]]
) -> dict[str, tuple[float, ...]]:
    """Return the factors of sites of an earlier run of this pass, multiplied by those of this run."""
    found = {**earlier, **later}
    for site in earlier.keys() & later.keys():
        found[site] = tuple(one * other for one, other in zip(earlier[site], later[site], strict=True))
    return found
