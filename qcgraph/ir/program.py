"""Program: named FX graphs that share constants, typed facts, and a history. Immutable; passes make new ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from qcgraph.errors import ContractError
from qcgraph.facts import Fact, Facts
from qcgraph.ir.graph import Variant
from qcgraph.ir.printer import print_program
from qcgraph.plan.spec import Interface
from qcgraph.plan.steps import StepPlan, digest, digest_of


@dataclass(frozen=True)
class Refusal:
    """A site or node that a pass left alone, and the reason."""

    where: str
    reason: str


@dataclass(frozen=True)
class HistoryEntry:
    """One entry of a program's history: the pass as pipeline text, and its results."""

    text: str
    changed: bool
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Program:
    """A denoiser under compilation.

    Attributes:
        variants: the graphs by name; a single one until a cache splits it. The step plan gives each its role.
        constants: every parameter and table by name, shared by all variants.
        facts: values that passes record for later passes, by type.
        history: the passes that have run.
    """

    variants: Mapping[str, Variant]
    constants: Mapping[str, torch.Tensor]
    facts: Facts = Facts()  # noqa: RUF009 - immutable
    history: tuple[HistoryEntry, ...] = ()

    @property
    def interfaces(self) -> dict[str, Interface]:
        """Inputs and outputs of every variant, by its name."""
        return {name: variant.interface for name, variant in self.variants.items()}

    def with_facts(self, *facts: Fact) -> Program:
        """Return this program with these facts added or replaced."""
        return replace(self, facts=self.facts.with_(*facts))

    def module(self, variant: str) -> fx.GraphModule:
        """Return an executable module of one variant, which holds the program's constants and no copies.

        Raises:
            ContractError: there is no such variant.
        """
        if variant not in self.variants:
            raise ContractError(f"no variant {variant!r}; there are: {', '.join(self.variants)}")
        if variant not in self._modules:
            self._modules[variant] = fx.GraphModule(dict(self.constants), self.variants[variant].graph)
        return self._modules[variant]

    def run(self, variant: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one variant in PyTorch.

        Args:
            variant: the name of the variant.
            inputs: a tensor for every name of the variant's interface; other entries are ignored.

        Returns:
            the outputs by name.
        """
        module, interface = self.module(variant), self.variants[variant].interface
        with torch.no_grad():
            outputs = module(*(inputs[name] for name in interface.input_names))
        return dict(zip(interface.output_names, outputs, strict=True))

    def prepared(self, variant: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the inputs of a variant, with the modulation from its preparing variant where it takes one."""
        plan = self.facts.get(StepPlan)
        preparing = plan.preparing.get(variant) if plan else None
        return {**inputs, **(self.run(preparing, inputs) if preparing else {})}

    @property
    def computing(self) -> str:
        """The variant that computes the whole network; before there is a step plan, the captured one.

        Raises:
            ContractError: there is no step plan, and several variants.
        """
        plan = self.facts.get(StepPlan)
        if plan is not None:
            return plan.computing
        if len(self.variants) != 1:
            raise ContractError("several variants and no step plan to say which of them computes")
        return next(iter(self.variants))

    @property
    def constant_bytes(self) -> int:
        """The size of all constants in bytes."""
        return sum(constant.nbytes for constant in self.constants.values())

    @cached_property
    def text(self) -> str:
        """The program as text (see `qcgraph.ir.printer`)."""
        return print_program(self.facts, self.variants)

    @cached_property
    def digest(self) -> str:
        """A digest of the whole program: its graphs, the values of its constants, its facts."""
        return self.compute_digest()

    def compute_digest(self) -> str:
        """Compute the digest anew; the property `digest` remembers it."""
        text = print_program(self.facts, self.variants)
        return digest(part.encode() for part in (text, self.constants_digest, digest_of(self.facts.encode())))

    @property
    def constants_digest(self) -> str:
        """A digest of the names and values of the constants."""
        return digest_of(sorted((name, tensor_digest(tensor)) for name, tensor in self.constants.items()))

    @cached_property
    def _modules(self) -> dict[str, fx.GraphModule]:
        return {}


_TENSOR_DIGESTS = WeakTensorKeyDictionary()  # tensor -> (version of the tensor when it was read, digest)


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's dtype, shape and bytes, remembered until the tensor is written to or deleted."""
    version, known = _TENSOR_DIGESTS.get(tensor, (-1, ""))
    if version != tensor._version:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        known = digest([f"{tensor.dtype}{tuple(tensor.shape)}".encode(), raw.data])
        _TENSOR_DIGESTS[tensor] = (tensor._version, known)
    return str(known)


def used_constants(
    variants: Iterable[Variant], constants: Mapping[str, torch.Tensor], facts: Facts
) -> dict[str, torch.Tensor]:
    """Return the constants that a graph refers to or a fact holds, in their order."""
    used = {str(node.target) for variant in variants for node in variant.graph.nodes if node.op == "get_attr"}
    return {name: value for name, value in constants.items() if name in used | facts.held_constants}
