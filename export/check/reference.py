"""References in float64: the size of a program's rounding errors, and the codes that a quantizer may legally make.

An exported graph and its program compute the same in the same type, and yet round at different places: a runtime may
keep a value wide between two operators, round a quotient that the program does not round, or add in another order. Both
differ from the program in float64, and the program's own distance from it is the size of such roundings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcgraph.ir.graph import DTYPES, Variant
from qcgraph.ir.ops import along
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import QuantizedSite

aten = torch.ops.aten
ops = torch.ops.qcgraph
QUANTIZES = (ops.quantize.default, ops.quantize_regions.default)
WIDENED = (torch.float32, torch.float16, torch.bfloat16)
# Largest relative distance of float32 quotients: by division, by multiplication with the reciprocal, or both fused.
QUOTIENT = 4 * 2.0**-24


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to a floating-point type."""
    return torch.finfo(dtype).eps / 2


class Shadowed(fx.Interpreter):
    """Runs a variant in its own types and, beside it, in float64 with the same codes.

    A program without rounding to codes is continuous, so both runs stay as close as the roundings of the operators
    allow.

    Args:
        program: the program to run.
        variant: the name of one of its variants.

    Attributes:
        rounding: quantizer -> relative L2 distance of its input from the same value in float64.
    """

    def __init__(self, program: Program, variant: str) -> None:
        super().__init__(program.module(variant))
        self._names = program.variants[variant].interface
        self._wide: dict[fx.Node, Any] = {}
        self.rounding: dict[str, float] = {}

    def outputs(self, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Run both, and return the outputs by name: those of the program, and those in float64."""
        with torch.no_grad():
            found = self.run(*(inputs[name] for name in self._names.input_names))
        output = next(node for node in self._wide if node.op == "output")
        names = self._names.output_names
        return dict(zip(names, found, strict=True)), dict(zip(names, self._wide[output], strict=True))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._wide = {node: wide for node, wide in self._wide.items() if node in self.env}
        if n.target in QUANTIZES:
            (source, *_) = n.all_input_nodes
            exact = self._wide[source]
            distance, norm = (self.env[source] - exact).norm(), exact.norm()
            self.rounding[n.name] = float(distance / norm) if norm else 0.0
        self._wide[n] = self._in_float64(n, value)
        return value

    def _in_float64(self, node: fx.Node, value: Any) -> Any:
        """Return the value of a node in float64; codes, indices and choices are the program's."""
        if node.op in ("placeholder", "get_attr"):
            return widened(value)
        if isinstance(value, torch.Tensor) and (node.target in QUANTIZES or not value.is_floating_point()):
            return value
        if node.op == "output":
            return fx.map_arg(node.args[0], self._wide.__getitem__)
        if node.target is ops.region.default:
            (source, split), upper = node.all_input_nodes, node.args[2]
            return torch.where((self.env[source] < self.env[split]) != upper, self._wide[source], 0.0)
        return _called(node, self._wide)


class Perturbed(fx.Interpreter):
    """Runs a variant whose quantizers see values with a small error, as other implementations have it.

    Args:
        program: the program to run.
        variant: the name of one of its variants.
        rounding: quantizer -> error of its input, relative to the input's root mean square.
        generator: draws the noise.
        magnified: factor of the noise, and with it of the number of flipped codes.
    """

    def __init__(
        self,
        program: Program,
        variant: str,
        rounding: Mapping[str, float],
        generator: torch.Generator,
        magnified: float = 1.0,
    ) -> None:
        super().__init__(program.module(variant))
        self._names = program.variants[variant].interface
        self._rounding = rounding
        self._generator = generator
        self._magnified = magnified

    def outputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the variant, and return its outputs by name."""
        with torch.no_grad():
            found = self.run(*(inputs[name] for name in self._names.input_names))
        return dict(zip(self._names.output_names, found, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        if n.target not in QUANTIZES:
            return super().run_node(n)
        (value, *parameters), _ = self.fetch_args_kwargs_from_env(n)
        wide = value.float()
        # Quotients may be rounded too, each by its size. Zeros are exact, such as those of the other region.
        size = torch.hypot(wide * unit_roundoff(value.dtype), self._rounding[n.name] * wide.square().mean().sqrt())
        noise = torch.randn(wide.shape, generator=self._generator) * size * (wide != 0) * self._magnified
        return n.target((wide + noise).to(value.dtype), *parameters)


@dataclass(frozen=True)
class LegalResult:
    """The result of a site in float64 for legal codes.

    Attributes:
        result: the result, f64.
        edges: error of each element from codes that may be one step apart, where a quotient is within float32's
            rounding of the edge between two codes.
        sums: error of each element, as a standard deviation, from sums that may be rounded to 16 bits after every
            addition; 0 in float32.
    """

    result: torch.Tensor
    edges: torch.Tensor
    sums: torch.Tensor


class SiteReference:
    """A quantized site in float64.

    A runtime may round the value that a ratio of scales divides, and the quotient that becomes a code, or may not. In
    16 bits each choice makes other codes, because numbers there are as far apart as a sixteenth of a step. Everything
    after the codes is continuous.

    Args:
        program: the program of the site.
        variant: the variant of the site.
        site: the site.
    """

    def __init__(self, program: Program, variant: str, site: QuantizedSite) -> None:
        self.site = site
        self._constants = program.constants
        self._nodes = _between(program.variants[variant], site)
        self._dtype = DTYPES[site.dtype]

    def legal_results(self, entering: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> Iterator[LegalResult]:
        """Yield the possible results, the program's first; equal ones once.

        Args:
            entering: the entering value, in the type of the site.
            inputs: the inputs of the variant, among them the timestep group.
        """
        regions = any(node.target is ops.quantize_regions.default for node in self._nodes)
        choices = [(True, regions), (True, not regions), (False, regions), (False, not regions)]
        found: list[torch.Tensor] = []
        for rounds_values, rounds_quotient in choices if self._dtype is not torch.float32 else choices[:1]:
            values, quotients = self._quotients(entering, inputs, rounds_values, rounds_quotient)
            codes = quotients.codes()
            if not any(torch.equal(codes, other) for other in found):
                found.append(codes)
                yield self._result({**values, quotients.node: codes}, quotients)

    def _quotients(
        self, entering: torch.Tensor, inputs: Mapping[str, torch.Tensor], rounds_values: bool, rounds_quotient: bool
    ) -> tuple[dict[fx.Node, Any], _Quotients]:
        """Return the values up to the quantizer, by node, and its quotients."""
        values: dict[fx.Node, Any] = {}
        following: set[fx.Node] = set()  # nodes that depend on the entering value
        for node in self._nodes:
            if node.name == self.site.entering:
                values[node] = entering.double()
                following.add(node)
            elif node.target in QUANTIZES:
                return values, _Quotients(node, values, self._dtype if rounds_quotient else torch.float32)
            elif node.op == "placeholder":
                values[node] = widened(inputs[str(node.target)])
            elif node.op == "get_attr":
                values[node] = widened(self._constants[str(node.target)])
            else:
                values[node] = _called(node, values)
                if not following.isdisjoint(node.all_input_nodes):
                    following.add(node)
                    values[node] = values[node].to(self._dtype).double() if rounds_values else values[node]
        raise AssertionError(f"{self.site.name} has no quantizer")

    def _result(self, values: dict[fx.Node, Any], quotients: _Quotients) -> LegalResult:
        """Compute the site's result from its codes."""
        edges, sums, factor = torch.zeros(()), torch.zeros(()), torch.ones(())
        for node in self._nodes:
            if node in values:
                continue
            if node.op == "get_attr":
                values[node] = widened(self._constants[str(node.target)])
                continue
            values[node] = _called(node, values)
            if node.name == self.site.product:
                edges, sums = self._variances(node, values, quotients)
            elif node.name == self.site.rescaled:
                factor = values[node.all_input_nodes[-1]].abs()
        result = next(values[node] for node in self._nodes if node.name == self.site.leaving)
        return LegalResult(result, *((item.sqrt() * factor).expand_as(result) for item in (edges, sums)))

    def _variances(
        self, product: fx.Node, values: Mapping[fx.Node, Any], quotients: _Quotients
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared errors of a product's elements: from codes on an edge, and from sums in 16 bits."""
        activation, factor = (values[node].float() for node in product.all_input_nodes[:2])
        squares = (factor.t() if product.target is aten.linear.default else factor).square()
        steps = quotients.steps_on_edge()
        edges = steps.float().square() @ squares if bool(steps.any()) else torch.zeros(())
        if self._dtype is torch.float32:
            return edges, torch.zeros(())
        # Partial sums of K terms t grow like a random walk, sum_j S_j^2 = K/2 (sum t^2 + S^2). Each is rounded once,
        # with a mean square of a sixth of the unit roundoff squared: uniform, over numbers whose logarithm is uniform.
        partial = len(squares) / 2 * (activation.square() @ squares + values[product].square())
        return edges, unit_roundoff(self._dtype) ** 2 / 6 * partial


class _Quotients:
    """The quotients of a quantizer, before they are rounded to codes.

    Args:
        node: the quantizer.
        values: the values of the nodes before it, in float64.
        dtype: the type that quotients are rounded to.
    """

    def __init__(self, node: fx.Node, values: Mapping[fx.Node, Any], dtype: torch.dtype) -> None:
        self.node = node
        arguments: list[Any] = [values[item] if isinstance(item, fx.Node) else item for item in node.args]
        value, scale, zero_point, *self._limits = arguments
        self._scale, self._zero_point = (along(self._limits[-1], item, value.dim()) for item in (scale, zero_point))
        self._exact = value / self._scale
        self._dtype = dtype

    def codes(self, factor: float = 1.0) -> torch.Tensor:
        """Return the codes of the quotients times a factor, rounded to their type."""
        quotients = (self._exact * factor).to(self._dtype).double()
        low, high = self._limits[:2]
        if self._zero_point.is_floating_point():  # 8-bit floating point
            return quotients.clamp(low, high).float().to(self._zero_point.dtype)
        zero = self._zero_point.double()
        if self.node.target is ops.quantize_regions.default:
            coarse = 2.0 ** self._limits[2]
            above = (quotients / coarse).round().clamp(min=0).minimum((high - zero) / coarse) * coarse
            codes = above + quotients.round().clamp(max=0) + zero
        else:
            codes = quotients.round() + zero
        return codes.clamp(low, high).to(self._zero_point.dtype)

    def steps_on_edge(self) -> torch.Tensor:
        """Return the distance of the two dequantized codes between which float32's rounding decides; 0 for most."""
        below, above = (self.codes(factor).float() for factor in (1 - QUOTIENT, 1 + QUOTIENT))
        return (above - below).abs() * self._scale


def widened(value: Any) -> Any:
    """Return floating-point tensors of 16 and 32 bits in float64, in tuples too, and anything else unchanged."""
    if isinstance(value, (tuple, list)):
        return type(value)(widened(item) for item in value)
    return value.double() if isinstance(value, torch.Tensor) and value.dtype in WIDENED else value


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return the result of an operator in float64; any floating-point type among its arguments becomes float64."""

    def wide(argument: Any) -> Any:
        return torch.float64 if argument in WIDENED else argument

    arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    positional = [wide(item) if isinstance(item, torch.dtype) else item for item in arguments[0]]
    named = {key: wide(item) if isinstance(item, torch.dtype) else item for key, item in arguments[1].items()}
    assert callable(node.target)
    return widened(node.target(*positional, **named))


def _between(variant: Variant, site: QuantizedSite) -> list[fx.Node]:
    """Return the nodes that a site's result depends on, from the entering value on, in order."""
    nodes = {node.name: node for node in variant.graph.nodes}
    needed, waiting = set(), [nodes[site.leaving]]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes if node.name != site.entering else []
    return [node for node in variant.graph.nodes if node in needed]
