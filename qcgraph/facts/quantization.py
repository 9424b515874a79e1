"""Facts about the quantization of sites and attention."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

FLOAT8 = "float8_e4m3fn"
LARGEST_FLOAT8 = 448


@dataclass(frozen=True)
class TimestepGroups:
    """Groups of neighbouring steps that share activation scales.

    Attributes:
        lower_timesteps: the smallest timestep value of each group, falling; group 0 is the noisiest.
    """

    lower_timesteps: tuple[float, ...]

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        bounds = ", ".join(f"{value:g}" for value in self.lower_timesteps)
        return [f"timestep groups {len(self.lower_timesteps)}, down to timestep {bounds}"]


def codes(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and largest code: ``-2^(b-1) .. 2^(b-1)-1`` when symmetric, else ``0 .. 2^b-1``."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


@dataclass(frozen=True)
class ActivationQuant:
    """Affine quantization of an activation: ``q = clamp(round(x / scale) + zero_point, low, high)``.

    Attributes:
        scales: one scale for each timestep group, or a single scale for all groups.
        zero_points: as many zero points as there are scales.
        low: the smallest code.
        high: the largest code.
        dtype: ``uint8``, ``int8`` or ``float8_e4m3fn``; codes of the last are floating point and have no zero point.
        shift: with two regions (TQ-DiT's MRQ), codes above the zero point are multiples of 2 to this power, so that
            positive values have a coarser step than negative ones; 0 for one step.
        bits: the bits of each timestep group, where they differ; ``low`` and ``high`` are then those of the most bits.
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    low: int
    high: int
    dtype: str
    shift: int = 0
    bits: tuple[int, ...] = ()

    def at(self, group: int) -> ActivationQuant:
        """Return the codes that one timestep group uses."""
        if not self.bits:
            return self
        low, high = codes(self.bits[group], symmetric=self.dtype == "int8")
        return replace(self, low=low, high=high, bits=())

    def describe(self) -> str:
        """Return one line: the codes and the scales."""
        low, high = min(self.scales), max(self.scales)
        scales = f"scales {low:.4g} .. {high:.4g} over {len(self.scales)} groups"
        if low == high:
            scales = f"scale {low:.4g}"
        codes = f"{self.dtype} codes {self.low}..{self.high}"
        if self.shift:
            codes += f" in two regions, above zero steps of {2**self.shift}"
        if self.bits:
            codes += f", bits {' '.join(map(str, self.bits))}"
        return f"{codes}, {scales}"


@dataclass(frozen=True)
class WeightQuant:
    """Symmetric quantization of a weight, with one scale for each output channel.

    Attributes:
        high: the largest code; codes are in ``[-high, high]``.
        dtype: the type of the codes, ``int8`` or ``float8_e4m3fn``.
        pair_high: the largest magnitude of the sum of two codes, those of the inputs 2k and 2k + 1, at least ``high``;
            None where sums are not limited.
    """

    high: int
    dtype: str = "int8"
    pair_high: int | None = None

    @classmethod
    def of_bits(cls, bits: int, pair_high: int | None) -> WeightQuant:
        """Return all integer codes of so many bits that the limit of pairs allows."""
        widest = 2 ** (bits - 1) - 1
        return cls(min(widest, pair_high or widest), pair_high=pair_high)

    def describe(self) -> str:
        """Return the codes in a few words."""
        pairs = f", two neighbours at most {self.pair_high} together" if self.pair_high is not None else ""
        return f"codes -{self.high}..{self.high} per channel{pairs}"


@dataclass(frozen=True)
class SiteQuant:
    """The quantization of one site."""

    activation: ActivationQuant
    weight: WeightQuant

    def describe(self) -> str:
        """Return one line: the codes and scales of the activation, the codes of the weight."""
        return f"activation {self.activation.describe()}; weight {self.weight.describe()}"


@dataclass(frozen=True)
class QuantPlan:
    """The quantization of each site, by name; a site that is missing here stays in floating point."""

    sites: dict[str, SiteQuant]

    @property
    def floating(self) -> tuple[str, ...]:
        """The sites that are planned in 8-bit floating point."""
        return tuple(name for name, site in self.sites.items() if FLOAT8 in (site.weight.dtype, site.activation.dtype))

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        return [f"quant {name}: {site.describe()}" for name, site in self.sites.items()]


@dataclass(frozen=True)
class RoundedWeight:
    """The codes that were chosen for the weight of one site, and the weight and form that they fit.

    Attributes:
        codes: the constant that holds the codes, i8[out,in].
        scale: the constant that holds their scales, f32[out].
        weight: the digest of the weight (see `qcgraph.ir.program.tensor_digest`).
        quant: the allowed codes.
    """

    codes: str
    scale: str
    weight: str
    quant: WeightQuant


@dataclass(frozen=True)
class RoundedWeights:
    """The chosen codes of weights, which the program holds until they are inserted.

    Attributes:
        sites: the codes of each site, by name; None where none could be chosen, so that the nearest codes are inserted.
    """

    sites: dict[str, RoundedWeight | None]

    @property
    def held_constants(self) -> tuple[str, ...]:
        """The constants that a program must hold for this fact."""
        return tuple(name for found in self.sites.values() if found for name in (found.codes, found.scale))

    def lines(self) -> list[str]:
        """Return no line, because the codes show once they are inserted."""
        return []


@dataclass(frozen=True)
class SiteCorrection:
    """The correction of a quantized linear's result without bias, per output channel: ``gain * result + offset``."""

    gains: tuple[float, ...]
    offsets: tuple[float, ...]


@dataclass(frozen=True)
class Requantization:
    """The correction of each site, by name, which is folded into its weight's scales and its bias."""

    sites: dict[str, SiteCorrection]

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        gains = [gain for site in self.sites.values() for gain in site.gains]
        bounds = f"gains {min(gains, default=1):.4f} .. {max(gains, default=1):.4f}"
        return [f"requantization of {len(self.sites)} sites, {bounds}"] if gains else []


@dataclass(frozen=True)
class RegionQuant:
    """Probabilities in two regions, each with a step and ``levels`` codes besides zero (TQ-DiT's MRQ, after a softmax).

    Attributes:
        splits: one split for each timestep group, or a single split for all. Values below it have the step
            ``split / levels``, values from it on have the step ``1 / levels``.
        levels: ``2^(bits-1) - 1``, because one of the bits selects the region.
        dtype: ``uint8`` or ``int8``.
        planes: 2 where each region is a tensor that is multiplied on its own, 1 where one tensor holds both.
    """

    splits: tuple[float, ...]
    levels: int
    dtype: str
    planes: int

    def describe(self) -> str:
        """Return one line: the codes and where the regions meet."""
        splits = " ".join(f"{split:g}" for split in self.splits)
        products = "two products" if self.planes > 1 else "one tensor"
        return f"{self.dtype} codes 0..{self.levels} in two regions, split at {splits}, {products}"


@dataclass(frozen=True)
class AttentionQuant:
    """The quantization of both products of an attention.

    Attributes:
        query: the codes of queries, which are scaled by one over the root of their length.
        key: the codes of keys.
        probabilities: the codes of the softmax's result.
        value: the codes of values.
    """

    query: ActivationQuant
    key: ActivationQuant
    probabilities: ActivationQuant | RegionQuant
    value: ActivationQuant

    @property
    def operands(self) -> dict[str, ActivationQuant | RegionQuant]:
        """The codes of each operand, by name."""
        return {"query": self.query, "key": self.key, "probabilities": self.probabilities, "value": self.value}

    def describe(self) -> str:
        """Return one line: the codes and scales of every operand."""
        return "; ".join(f"{name} {quant.describe()}" for name, quant in self.operands.items())


@dataclass(frozen=True)
class AttentionPlan:
    """The quantization of each attention, by name; an attention that is missing here stays in floating point."""

    sites: dict[str, AttentionQuant]

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        return [f"quant {name}: {site.describe()}" for name, site in self.sites.items()]


@dataclass(frozen=True)
class LinearNodes:
    """The names of the nodes of a quantized linear layer in one variant.

    Attributes:
        quantizer: the node that makes the codes of the activation.
        product: the node that multiplies the dequantized activation and the dequantized weight.
        leaving: the node that gives the result, bias included.
        divides: the node that divides the activation by a ratio of scales before it is quantized (see
            reference-scales), or empty.
        rescales: the node that multiplies the product by this ratio, or empty.
    """

    quantizer: str
    product: str
    leaving: str
    divides: str = ""
    rescales: str = ""


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer whose activation and weight are quantized.

    Attributes:
        weight: the constant of the captured model that the codes were made from.
        codes: the constant that holds the codes.
        scale: the constant that holds their scales, one for each output channel.
        transposed: whether the codes are [in,out], the layout of a matrix product, instead of [out,in].
        nodes: the nodes of the layer by variant.
    """

    weight: str
    codes: str
    scale: str
    transposed: bool
    nodes: dict[str, LinearNodes]


@dataclass(frozen=True)
class AttentionNodes:
    """The names of the nodes of a quantized attention in one variant.

    Attributes:
        quantizers: by operand, the nodes that make its codes; probabilities in two regions have two.
        products: the nodes that multiply dequantized operands.
    """

    quantizers: dict[str, tuple[str, ...]]
    products: tuple[str, ...]

    @property
    def all_quantizers(self) -> tuple[str, ...]:
        """The quantizers of all operands."""
        return tuple(name for names in self.quantizers.values() for name in names)


@dataclass(frozen=True)
class QuantizedAttention:
    """An attention whose products are quantized.

    Attributes:
        nodes: the nodes of the attention by variant.
    """

    nodes: dict[str, AttentionNodes]


@dataclass(frozen=True)
class QuantizedSites:
    """The quantized sites of a program. Passes that change the form of a quantized site update this fact.

    Attributes:
        linears: the quantized linear layers by site, in order.
        attentions: the quantized attentions by name, in order.
    """

    linears: dict[str, QuantizedLinear]
    attentions: dict[str, QuantizedAttention]

    def with_sites(self, other: QuantizedSites) -> QuantizedSites:
        """Return the sites of this fact and of another one."""
        return QuantizedSites({**self.linears, **other.linears}, {**self.attentions, **other.attentions})

    def linears_of(self, variant: str) -> Iterator[tuple[str, QuantizedLinear, LinearNodes]]:
        """Yield the name, the constants and the nodes of each quantized linear layer of a variant."""
        for name, linear in self.linears.items():
            if variant in linear.nodes:
                yield name, linear, linear.nodes[variant]

    def attentions_of(self, variant: str) -> Iterator[tuple[str, AttentionNodes]]:
        """Yield the name and the nodes of each quantized attention of a variant."""
        for name, attention in self.attentions.items():
            if variant in attention.nodes:
                yield name, attention.nodes[variant]

    def quantizers_of(self, variant: str) -> frozenset[str]:
        """Return the nodes that make codes of activations in a variant."""
        attentions = (nodes.all_quantizers for _, nodes in self.attentions_of(variant))
        return frozenset(nodes.quantizer for *_, nodes in self.linears_of(variant)).union(*attentions)

    def products_of(self, variant: str) -> frozenset[str]:
        """Return the nodes that multiply dequantized operands in a variant."""
        attentions = (nodes.products for _, nodes in self.attentions_of(variant))
        return frozenset(nodes.product for *_, nodes in self.linears_of(variant)).union(*attentions)

    def in_variants(self, made_of: Mapping[str, str], kept: Mapping[str, Collection[str]]) -> QuantizedSites:
        """Return the sites of new variants that were made from the present ones.

        Args:
            made_of: for each new variant, the present variant that it was made from; nodes keep their names.
            kept: for each new variant, the names of its nodes. A site whose product is not among them is not in the
                variant.
        """
        linears, attentions = {}, {}
        for name, linear in self.linears.items():
            found = {new: linear.nodes[old] for new, old in made_of.items() if old in linear.nodes}
            found = {new: nodes for new, nodes in found.items() if nodes.product in kept[new]}
            if found:
                linears[name] = replace(linear, nodes=found)
        for name, attention in self.attentions.items():
            placed = {new: attention.nodes[old] for new, old in made_of.items() if old in attention.nodes}
            placed = {new: nodes for new, nodes in placed.items() if nodes.products[-1] in kept[new]}
            if placed:
                attentions[name] = QuantizedAttention(placed)
        return QuantizedSites(linears, attentions)

    def lines(self) -> list[str]:
        """Return no line, because the text of the graphs shows the quantizers."""
        return []
