"""The interface of the one ONNX model that a bundle becomes: inputs, outputs, and the plan for its host. No ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qcgraph.bundle import Bundle
from qcgraph.facts import encode
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import GROUP, ROW, Interface, TensorSpec
from qcgraph.sampling.cache_state import depths

PLAN_FORMAT = 2
VARIANT = "variant"  # i64[1]: the index of the variant that runs
START = "start"  # bool[1]: whether a trajectory begins


@dataclass(frozen=True)
class HostedCache:
    """A cached value of the request, which the host hands back unchanged.

    Attributes:
        value: the cached value.
        age: the number of computing steps between this value and the last one.
        spec: its type and shape.
    """

    value: str
    age: int
    spec: TensorSpec

    @property
    def taken(self) -> TensorSpec:
        """The input that takes this value."""
        return replace(self.spec, name=f"{self._name}_in", age=self.age)

    @property
    def given(self) -> TensorSpec:
        """The output that gives this value."""
        return replace(self.spec, name=f"{self._name}_out", age=self.age)

    @property
    def _name(self) -> str:
        return f"{self.value}_age{self.age}" if self.age else self.value


@dataclass(frozen=True)
class SingleModel:
    """The interface of the one model.

    Attributes:
        variants: the variants, in the order of their indices.
        inputs: the inputs except caches: those of the request, one number for each step, and ``start`` where it has an
            effect.
        output: the noise prediction.
        cache: the cached values.
    """

    variants: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    cache: tuple[HostedCache, ...]

    @classmethod
    def of(cls, bundle: Bundle) -> SingleModel:
        """Return the interface of the model that a bundle becomes."""
        variants, interfaces = bundle.plan.variants, bundle.interfaces
        cache = _cache([interfaces[name] for name in variants])
        inputs: dict[str, TensorSpec] = {}
        for name in variants:
            for spec in (*interfaces[name].inputs, *_preparing(bundle, name)):
                if spec.role not in (TensorRole.CACHE, TensorRole.MODULATION):
                    inputs.setdefault(spec.name, replace(spec, shape=spec.shape or (1,)))
        inputs[VARIANT] = TensorSpec(VARIANT, "i64", (1,))
        if any(item.age for item in cache):
            inputs[START] = TensorSpec(START, "bool", (1,))
        return cls(variants, tuple(inputs.values()), interfaces[variants[0]].result, cache)

    @property
    def all_inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs, caches last."""
        return (*self.inputs, *(item.taken for item in self.cache))

    @property
    def all_outputs(self) -> tuple[TensorSpec, ...]:
        """All outputs, caches last and in the order of the inputs."""
        return (self.output, *(item.given for item in self.cache))

    @property
    def numbers(self) -> tuple[str, ...]:
        """The inputs that are one number for each step."""
        return tuple(spec.name for spec in self.inputs if spec.shape == (1,))


def host_plan(bundle: Bundle, single: SingleModel) -> dict[str, Any]:
    """Return the plan for a host as JSON data: the model, and for each step its numbers and the sampler's update."""
    plan, spec = bundle.plan, bundle.spec
    steps = []
    for index, step in enumerate(plan.steps):
        numbers = {VARIANT: single.variants.index(step.variant), GROUP.name: step.group, ROW.name: step.row}
        every = {**numbers, START: index == 0}
        chosen = {name: every[name] for name in single.numbers}
        steps.append({"timestep": step.timestep, **chosen, "update": encode(step.update)})
    return {
        "format": PLAN_FORMAT,
        "model": spec.name,
        "latent_shape": spec.latent_shape,
        "conditions": [encode(condition) for condition in spec.conditions],
        "scheduler": plan.fingerprint.scheduler,
        "guidance": plan.fingerprint.guidance,
        "paired": plan.restores_half,
        "variants": single.variants,
        "numbers": single.numbers,
        "cache": {item.taken.name: item.given.name for item in single.cache},
        "steps": steps,
    }


def _cache(interfaces: Sequence[Interface]) -> tuple[HostedCache, ...]:
    """Return the cached values that a variant reads, and the later values that will become them."""
    depth = depths(interfaces)
    read = {spec.value for interface in interfaces for spec in interface.taken(TensorRole.CACHE)}
    found: dict[tuple[str, int], HostedCache] = {}
    for spec in (spec for interface in interfaces for spec in interface.caches if spec.value in read):
        for age in range(depth.get(spec.value, 0) + 1):
            found.setdefault((spec.value, age), HostedCache(spec.value, age, spec))
    return tuple(found.values())


def _preparing(bundle: Bundle, variant: str) -> tuple[TensorSpec, ...]:
    """Return the inputs of the preparing variant of a variant."""
    preparing = bundle.plan.preparing.get(variant)
    return bundle.interfaces[preparing].inputs if preparing else ()
