"""Passes side by side: every pair that a default pipeline can bring about, and what holds after each of its passes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise, product
from typing import Any

import pytest
import torch

from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.errors import UsageError
from qcgraph.evaluation.ablation import dequantized_weight
from qcgraph.export.targets import TARGETS
from qcgraph.facts import (
    AttentionPlan,
    CachePlan,
    CalibrationSet,
    Compensation,
    Equalization,
    EqualizationPlan,
    Facts,
    ForecastFit,
    QuantizedSites,
    QuantPlan,
    Ranges,
    Requantization,
    RoundedWeights,
    SolverPlan,
    SolverTargets,
)
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import quantize_weight
from qcgraph.ir.quantized_sites import quantized_sites, sites_of
from qcgraph.ir.structure import find_sites
from qcgraph.pipeline import Pass, Pipeline, registry
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import PREDICTION_NAME, ModelSpec
from qcgraph.plan.steps import CAPTURED, StepPlan
from qcgraph.recipe import Recipe

Pair = tuple[str, str]
Choices = Mapping[str, Mapping[str, Any]]
Outputs = dict[str, dict[str, torch.Tensor]]
STEPS = 5
SERVED = {
    "insert-qdq": {CalibrationSet, RoundedWeights},
    "equalize": {EqualizationPlan},
    "fit-solver": {SolverTargets},
}  # facts that a pass takes away, because they have served
# How far outputs may move. What is not here decides without changing any graph or constant.
SAME = {"insert-forecast": 1e-5, "drop-variants": 0.0, "split-attention": 1e-4, "lower-linear": 1e-4}
SAME |= {"equalize": 1e-3, "insert-cache": 0.0, "hoist-adaln": 1e-4}
CLOSE = {"insert-qdq": 0.3, "insert-attention-qdq": 0.1, "reference-scales": 0.1, "reduce-precision": 0.1}
CLOSE |= {"fit-forecast": 1.0, "insert-compensation": 0.2}
CALIBRATION = {"trajectories": 2, "samples": 6}
pytestmark = pytest.mark.slow  # there are many recipes

# What decides which passes there are, by section of the recipe. Numbers are left as they are: they add no pass.
OFF: Choices = {"quantization": {"bits": "off"}}
QUANTIZED: tuple[Choices, ...] = (
    *(
        {
            "quantization": {
                "bits": bits,
                "attention": attention,
                "scales": scales,
                "regions": scales == "fisher" and "auto",
                "rounding": rounding,
                "correction": correction,
                "equalize": equalize,
            }
        }
        for bits, attention, scales, rounding, correction, equalize in product(
            ("w4a8", "auto=5"),
            (True, False),
            ("fisher", "range"),
            ("feedback", "nearest"),
            ("all", "off"),
            (True, False),
        )
    ),
    {"quantization": {"bits": "fp8"}},
    {"quantization": {"bits": "fp8", "correction": "off"}},
)
UNCACHED: Choices = {"cache": {"schedule": "off"}}
CACHED: tuple[Choices, ...] = tuple(
    {"cache": {"schedule": schedule, "blocks": blocks, "forecast": forecast}}
    for schedule, blocks, forecast in product(
        ("interval=2", "dps=2", "budget=0.6", "plan=800-200:FRFRF"), ("all", "0..0+guidance"), ("reuse", "affine")
    )
)
FITTED: Choices = {"solver": {"mode": "fitted=3", "target": "run"}}  # it takes the place of the compensation
AFTER: tuple[Choices, ...] = tuple(
    {"modulation": {"hoist": hoist}, **last}
    for hoist, last in product((False, True), ({}, {"compensation": {"mode": "vc"}}, FITTED))
)
TYPES = ("auto", "float32", "float16")


def made(target: str, *choices: Choices) -> Recipe:
    """A recipe of these choices for a target."""
    data = {"target": {"name": target}, "calibration": CALIBRATION, "sampling": {"steps": STEPS}}
    for part in choices:
        for section, values in part.items():
            data[section] = {**data.get(section, {}), **values}
    return Recipe.model_validate(data)


def pipeline(recipe: Recipe) -> Pipeline | None:
    """The default pipeline of a recipe, None where its target cannot hold what it asks for."""
    try:
        return default_pipeline(recipe, TARGETS[recipe.target.name])
    except UsageError:
        return None


def recipes() -> Iterator[Recipe]:
    """Recipes among whose pipelines is every pair.

    What quantizes stands between group-timesteps and insert-qdq whatever else is asked for, so its choices need not be
    combined with all the others; nor need those of the target, whose passes come last, with what is not last.
    """
    ends = (UNCACHED, CACHED[0])
    for quantized, cache in product((OFF, *QUANTIZED), ends):
        yield made("torch", quantized, cache)
    few = (OFF, QUANTIZED[0], QUANTIZED[1], QUANTIZED[-1], QUANTIZED[-2])
    for quantized, cache, after in product(few, (UNCACHED, *CACHED), AFTER):
        yield made("torch", quantized, cache, after)
    for target, precision, quantized, cache, after in product(TARGETS, TYPES, few, (UNCACHED, *CACHED[:8:3]), AFTER):
        yield made(target, quantized, cache, after, {"target": {"name": target, "precision": precision}})


def names(passes: Iterable[Pass]) -> list[str]:
    return [pass_.name for pass_ in passes]


def ordered(passes: Sequence[str]) -> set[Pair]:
    """Every earlier and later pass of a pipeline."""
    return {(earlier, later) for index, earlier in enumerate(passes) for later in passes[index + 1 :]}


@pytest.fixture(scope="module")
def possible() -> dict[tuple[str, ...], Recipe]:
    """A recipe for every sequence of passes."""
    found: dict[tuple[str, ...], Recipe] = {}
    for recipe in recipes():
        chosen = pipeline(recipe)
        if chosen is not None:
            found.setdefault(tuple(names(chosen)), recipe)
    return found


@pytest.fixture(scope="module")
def chosen(possible: dict[tuple[str, ...], Recipe]) -> list[Pipeline]:
    """Pipelines that bring about all pairs, side by side or not, and begin alike as far as that can be."""
    pairs = {passes: {*ordered(passes), *pairwise_apart(passes)} for passes in possible}
    pipelines = {passes: default_pipeline(recipe, TARGETS[recipe.target.name]) for passes, recipe in possible.items()}
    starts = {passes: set(beginnings(found)) for passes, found in pipelines.items()}
    left, begun, found = set[object]().union(*pairs.values()), set[str](), list[Pipeline]()
    while left:
        best = max(possible, key=lambda passes: len(pairs[passes] & left) / (1 + cost(starts[passes] - begun)))
        left -= pairs[best]
        begun |= starts[best]
        found.append(pipelines[best])
    return found


def cost(texts: Iterable[str]) -> int:
    """What it costs to run the last passes of these pipelines: reduce-precision types every graph anew."""
    return sum(4 if "reduce-precision" in text else 1 for text in texts)


def beginnings(passes: Pipeline) -> list[str]:
    """The texts of the first pass, the first two, and so on."""
    return [Pipeline(passes.passes[: end + 1]).text for end in range(len(passes.passes))]


def pairwise_apart(passes: Sequence[str]) -> set[tuple[str, str, str]]:
    """Pairs that are side by side, which count apart from those that only come in this order."""
    return {(*pair, "side by side") for pair in pairwise(passes)}


def test_no_other_recipe_brings_about_another_pair(possible: dict[tuple[str, ...], Recipe]) -> None:
    """Of all choices together, a sample: what `recipes` leaves out brings nothing new."""
    known = set(chain.from_iterable(map(pairwise, possible)))
    draw = random.Random(0)
    for _ in range(400):
        target = draw.choice(list(TARGETS))
        precision = {"target": {"name": target, "precision": draw.choice(TYPES)}}
        parts = [draw.choice(options) for options in ((OFF, *QUANTIZED), (UNCACHED, *CACHED), AFTER)]
        passes = pipeline(made(target, *parts, precision))
        assert set(pairwise(names(passes or ()))) <= known


def test_every_pass_is_in_a_default_pipeline(possible: dict[tuple[str, ...], Recipe]) -> None:
    assert set(chain.from_iterable(possible)) == set(registry())


def test_every_pair_keeps_what_was_decided(
    captured: Program, possible: dict[tuple[str, ...], Recipe], chosen: list[Pipeline]
) -> None:
    """The tiny denoiser through all of them, looked at after every pass; what begins alike runs once."""
    steps = make_step_plan("ddim", STEPS, 1.5, captured.facts[ModelSpec].noise_schedule, captured.constants_digest)
    reached: dict[str, Watched] = {"": Watched(captured.with_facts(steps))}
    covered: set[Pair] = set()
    for passes in chosen:
        covered |= set(pairwise(names(passes)))
        texts = beginnings(passes)
        for pass_, before, text in zip(passes, ["", *texts], texts, strict=False):
            if text not in reached:
                reached[text] = reached[before].after(pass_)
    assert covered == set(chain.from_iterable(map(pairwise, possible)))


@dataclass(frozen=True)
class Watched:
    """A program, and what is known of it.

    Attributes:
        program: the program.
        codes: per site, the codes and scales that were chosen for its weight.
    """

    program: Program
    codes: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def outputs(self) -> Outputs:
        return outputs(self.program)

    def after(self, pass_: Pass) -> Watched:
        """What a pass makes of it, checked: it did what it says, and left alone what others decided."""
        before, digest = self.program, self.program.digest
        program = Pipeline((pass_,)).run(before)
        assert before.compute_digest() == digest, f"{pass_.name} wrote to the program that it was given"
        found = Watched(program, self.codes or _chosen_codes(pass_, before, program))
        _facts_are_kept(pass_, before, program)
        _subjects_exist(program)
        _codes_are_those_that_were_chosen(program, found.codes)
        if pass_.name in SAME | CLOSE:
            _outputs_moved_as_promised(pass_, self.outputs, found.outputs)
        else:
            _nothing_runs_otherwise(pass_, before, program)
        return found


def _nothing_runs_otherwise(pass_: Pass, before: Program, after: Program) -> None:
    """A pass that only decides leaves every graph and constant."""
    assert {name: variant.graph for name, variant in after.variants.items()} == {
        name: variant.graph for name, variant in before.variants.items()
    }, f"{pass_.name} changed a graph"
    assert all(after.constants[name] is value for name, value in before.constants.items()), pass_.name
    assert set(after.constants) - set(before.constants) == after.facts.held_constants - before.facts.held_constants


def _facts_are_kept(pass_: Pass, before: Program, after: Program) -> None:
    """A fact survives JSON, and stays what it is unless the pass provides it, or takes it and gives another."""
    # Where a program is quantized is kept true by every pass that changes the form of a site (see site_rules).
    own = {kind.__name__ for kind in (*pass_.provides, *pass_.requires, QuantizedSites)}
    served = {kind.__name__ for kind in SERVED.get(pass_.name, ())}
    old, new = before.facts.encode(), after.facts.encode()
    assert Facts.decode(json.loads(json.dumps(new))).encode() == new
    assert not served & new.keys(), f"{pass_.name} kept what has served"
    for name in old.keys() - own - served:
        assert new.get(name) == old[name], f"{pass_.name} changed {name}"


def _chosen_codes(pass_: Pass, before: Program, after: Program) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scales of weights, by site: those of the pass that chooses, else the nearest when they are inserted."""
    if pass_.name == "round-weights":
        rounded = after.facts[RoundedWeights].sites
        assert set(rounded) == set(after.facts[QuantPlan].sites)
        return {
            site: (after.constants[found.codes], after.constants[found.scale])
            for site, found in rounded.items()
            if found
        }
    if pass_.name == "insert-qdq":
        plan, linears = before.facts[QuantPlan].sites, after.facts[QuantizedSites].linears
        weights = {site: before.constants[linears[site].weight] for site in plan}
        return {site: quantize_weight(weights[site], quant.weight) for site, quant in plan.items()}
    return {}


def _codes_are_those_that_were_chosen(
    program: Program, chosen_codes: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """What quantized layers hold is what was chosen, to the bit; dequantized, what corrects a result taken out."""
    for name in program.variants:
        sites = quantized_sites(program, name)
        if name == program.computing and sites:
            assert {site.name for site in sites} == set(chosen_codes)
        for site in sites:
            (codes, scale), held = chosen_codes[site.name], program.constants[site.codes]
            is_lowered = not (held.shape == codes.shape and torch.equal(held, codes))
            assert torch.equal(held.t() if is_lowered else held, codes), f"{site.name} of {name} has other codes"
            weight = dequantized_weight(program, name, site).float()
            torch.testing.assert_close(
                weight.t() if is_lowered else weight,
                codes.float() * scale[:, None],
                rtol=2e-5 if site.dtype == "f32" else 2e-2,
                atol=1e-8,
            )


def _subjects_exist(program: Program) -> None:
    """What facts speak of is there."""
    facts = program.facts
    sites = {site.name for variant in program.variants.values() for site in find_sites(variant)}
    for kind in (QuantPlan, RoundedWeights, Requantization):
        assert set(getattr(facts.get(kind), "sites", ())) <= sites, kind
    assert set(sites_of(facts).linears) <= sites
    for observed in (facts.get(Ranges),):
        assert set(observed.planned if observed else ()) <= sites
    if equalization := facts.get(Equalization):
        assert {*equalization.inputs, *equalization.outputs} <= sites
    if (cache := facts.get(CachePlan)) and facts[StepPlan].computing != CAPTURED:
        steps = facts[StepPlan]
        assert (
            set(steps.variants) - {steps.computing} <= set(cache.modes) == set(steps.reusing) <= set(program.variants)
        )
        values = {value.name for value in cache.values}
        computing = program.variants[steps.computing].interface
        assert set(computing.output_names) == {PREDICTION_NAME, *values}
        assert {spec.value for spec in computing.caches} == values
        for mode, reused in cache.modes.items():
            assert set(reused) <= set(program.variants[mode].interface.input_names)
        if fit := facts.get(ForecastFit):
            assert {step.name for step in fit.steps} <= values
    if solver := facts.get(SolverPlan):
        assert len(solver.plain) == len(facts[StepPlan])
        assert facts[StepPlan].is_fitted
    if compensation := facts.get(Compensation):
        assert len(compensation.gains) == len(facts[StepPlan])
    if attention := facts.get(AttentionPlan):
        assert attention.sites


def outputs(program: Program) -> Outputs:
    """What every variant gives at one step, from what the computing one gives."""
    generator = torch.Generator().manual_seed(3)
    spec, plan = program.facts[ModelSpec], program.facts[StepPlan]
    step = plan.steps[2]
    latent = torch.randn(2, *spec.latent_shape, generator=generator).repeat(2, 1, 1, 1)
    inputs: dict[str, torch.Tensor] = {
        "latent": latent,
        "timestep": torch.full((4,), step.timestep),
        "class_label": torch.tensor([1, 3, *[spec.conditions[0].null] * 2]),
        "group": torch.tensor(step.group),
        "row": torch.tensor(step.row),
    }
    found: Outputs = {}
    cached: dict[str, torch.Tensor] = {}
    for name in (plan.computing, *plan.reusing):
        interface = program.variants[name].interface
        given = inputs | {spec.name: cached[spec.value] for spec in interface.taken(TensorRole.CACHE)}
        found[name] = program.run(name, program.prepared(name, given))
        cached |= {spec.value: found[name][spec.name] for spec in interface.caches}
    return found


def _outputs_moved_as_promised(pass_: Pass, old: Outputs, new: Outputs) -> None:
    """Every value that both programs give is as near as the pass lets it be; what is split was the whole before."""
    limit = {**SAME, **CLOSE}[pass_.name]
    whole = {"full": old["main"]} if pass_.name == "insert-cache" else old
    for name, known in whole.items():
        for key in known.keys() & new.get(name, {}).keys():
            one, other = known[key].float(), new[name][key].float()
            moved = float((other - one).norm() / one.norm())
            assert moved <= limit, f"{pass_.name}: {key} of {name} moved by {moved:.2g}"
