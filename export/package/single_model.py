"""The outside of the one ONNX model that a bundle becomes: inputs, outputs, and what its host has to know. No ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcgraph.bundle import Bundle
from qcgraph.facts import encode
from qcgraph.plan.spec import MODULATION, Interface, TensorSpec, preparation
from qcgraph.sampling.cache_state import aged, depths

PLAN_FORMAT = 1
VARIANT = "variant"  # i64[1]: the variant that runs, as an index
START = "start"  # bool[1]: whether a trajectory begins


@dataclass(frozen=True)
class CacheTensor:
    """A cached value of the request, which the host hands back as it came.

    Attributes:
        name: its name in the bundle.
        spec: its type and shape.
        younger: the cached value that becomes this one when a step computes; None where this is what is computed.
        computed: the output of a variant that starts the chain.
    """

    name: str
    spec: TensorSpec
    younger: str | None
    computed: str

    @property
    def taken(self) -> TensorSpec:
        """The input."""
        return TensorSpec(f"{self.name}_in", self.spec.dtype, self.spec.shape)

    @property
    def given(self) -> TensorSpec:
        """The output."""
        return TensorSpec(f"{self.name}_out", self.spec.dtype, self.spec.shape)


@dataclass(frozen=True)
class SingleModel:
    """The outside of the one model.

    Attributes:
        variants: the variants, in the order of their indices.
        inputs: the inputs but caches: what a request has, one number a step, and ``start`` where it matters.
        output: the noise prediction.
        cache: the cached values.
    """

    variants: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    cache: tuple[CacheTensor, ...]

    @classmethod
    def of(cls, bundle: Bundle) -> SingleModel:
        """What a bundle becomes."""
        variants, interfaces = bundle.plan.variants, bundle.interfaces
        cache = _cache({name: interfaces[name] for name in variants})
        handed = {MODULATION, *(item.name for item in cache)}
        inputs: dict[str, TensorSpec] = {}
        for name in variants:
            for spec in (*interfaces[name].inputs, *_preparing(bundle, name)):
                if spec.name not in handed:
                    inputs.setdefault(spec.name, TensorSpec(spec.name, spec.dtype, spec.shape or (1,)))
        inputs[VARIANT] = TensorSpec(VARIANT, "i64", (1,))
        if any(item.younger for item in cache):
            inputs[START] = TensorSpec(START, "bool", (1,))
        return cls(variants, tuple(inputs.values()), interfaces[variants[0]].outputs[0], cache)

    @property
    def interface(self) -> Interface:
        """All inputs and outputs; caches come last, inputs and outputs in the same order."""
        return Interface(
            (*self.inputs, *(item.taken for item in self.cache)),
            (self.output, *(item.given for item in self.cache)),
        )

    @property
    def numbers(self) -> tuple[str, ...]:
        """The inputs that are one number a step."""
        return tuple(spec.name for spec in self.inputs if spec.shape == (1,))


def host_plan(bundle: Bundle, single: SingleModel) -> dict[str, Any]:
    """What a host has to know, as JSON data: the model, and for each step its numbers and the sampler's update."""
    plan, spec = bundle.plan, bundle.spec
    steps = []
    for index, step in enumerate(plan.steps):
        numbers = {VARIANT: single.variants.index(step.variant), "group": step.group, "row": step.row}
        every = {**numbers, START: index == 0}
        chosen = {name: every[name] for name in single.numbers}
        steps.append({"timestep": step.timestep, **chosen, "update": encode(step.update)})
    return {
        "format": PLAN_FORMAT,
        "model": spec.name,
        "latent_shape": spec.latent_shape,
        "class_count": spec.class_count,
        "null_class": spec.null_class,
        "scheduler": plan.fingerprint.scheduler,
        "guidance": plan.fingerprint.guidance,
        "paired": bool(plan.paired),
        "variants": single.variants,
        "numbers": single.numbers,
        "cache": {item.taken.name: item.given.name for item in single.cache},
        "steps": steps,
    }


def _cache(interfaces: Mapping[str, Interface]) -> tuple[CacheTensor, ...]:
    """The cached values that a variant reads, and those between them and what is computed."""
    depth = depths(interfaces.values())
    found: dict[str, CacheTensor] = {}
    read = {name for interface in interfaces.values() for name in interface.input_names}
    for spec in (spec for interface in interfaces.values() for spec in interface.outputs[1:]):
        for age in range(depth.get(spec.name, 0) + 1):
            name = aged(spec.name, age)
            younger = aged(spec.name, age - 1) if age else None
            if name in read or spec.name in depth:
                found.setdefault(name, CacheTensor(name, spec, younger, spec.name))
    return tuple(found.values())


def _preparing(bundle: Bundle, variant: str) -> tuple[TensorSpec, ...]:
    """The inputs of what prepares a variant."""
    return bundle.interfaces[preparation(variant)].inputs if variant in bundle.plan.prepared else ()
