"""Recipe: all settings of a compilation, as TOML and as validated data. No torch.

A recipe is a preset (``careful``, ``balanced``, ``fast``), a TOML file, or neither; options of the command line go on
top. The fully resolved recipe is written into the bundle as ``recipe.lock.toml``, which is a recipe too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qcgraph.errors import UsageError, closest, shown
from qcgraph.files.documents import is_text, parse_toml, read_toml
from qcgraph.plan.schedule import TimedSchedule
from qcgraph.recipe.gate import TERMS, Gate

PRESETS = Path(__file__).parent / "presets"
_BITS = re.compile(r"w([2-8])a([2-8])")
MOST_BITS = 8
# Largest numbers in a recipe: far above all use, and small enough that no computation with them is endless.
MOST_STEPS = 100_000
MOST_COUNT = 1_000_000  # number of trajectories, samples and tries
MOST_SEED = 2**63 - 1  # the largest seed that every generator of random numbers takes
MOST_MEMORY = 2**50  # bytes
MOST_GUIDANCE = 10_000.0
MOST_NAME = 64  # characters in the name of a scheduler or a forecaster
AUTO = "auto"
AUTO_BITS = AUTO
_MIXED = re.compile(r"auto=([4-7](?:\.[0-9]{1,17})?|8(?:\.0{1,17})?)")
_AUTO = re.compile(AUTO_BITS)
_FLOAT8 = re.compile("fp8")
_INTERVAL = re.compile(r"(interval|dps)=([1-9][0-9]{0,5})")
_BUDGET = re.compile(r"budget=(1(?:\.0{0,17})?|0?\.(?=[0-9]*[1-9])[0-9]{1,17})")
_PLAN = re.compile(r"plan=(\S+)")
_SCHEDULES = (_AUTO, _INTERVAL, _BUDGET, _PLAN)
_FITTED = re.compile(r"fitted(?:=([1-9][0-9]{0,4}))?")
_RANGE = r"(?:all|guidance|[0-9]{1,5}\.\.[0-9]{1,5})"
_BLOCKS = re.compile(rf"{_RANGE}(?:\+{_RANGE})*")


def _fits(*patterns: re.Pattern[str], word: str) -> AfterValidator:
    """Return a validator that accepts one word, or a match of a pattern; its error quotes the field's description."""

    def check(value: str) -> str:
        if value != word and not any(pattern.fullmatch(value) for pattern in patterns):
            raise ValueError(value)
        return value

    return AfterValidator(check)


def _rising(value: str) -> str:
    for first, last in re.findall(r"([0-9]+)\.\.([0-9]+)", value):
        if int(first) > int(last):
            raise ValueError(value)
    return value


def _readable_plan(value: str) -> str:
    if match := _PLAN.fullmatch(value):
        try:
            TimedSchedule.parse(match[1])
        except UsageError as error:
            raise UsageError(error.message, where="cache.schedule", hint=error.hint) from None
    return value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(_Section):
    """The sampling of images; a bundle is compiled for exactly these settings."""

    scheduler: str = Field(
        "auto",
        min_length=1,
        max_length=MOST_NAME,
        description="the name of a scheduler, for example ddim or dpmsolver++; or auto: that of the model's folder, "
        "where it has one whose steps can be planned, else ddim, or flow-euler for flows",
    )
    steps: int = Field(
        50, ge=1, le=MOST_STEPS, description=f"the number of sampling steps, 1 or more, {MOST_STEPS} at most"
    )
    guidance: float = Field(
        1.5,
        ge=0,
        le=MOST_GUIDANCE,
        description=f"the weight of classifier-free guidance, 0 or more, {MOST_GUIDANCE:g} at most; 1 means none",
    )


class Calibration(_Section):
    """The full-precision trajectories that ranges and statistics are taken from."""

    trajectories: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_COUNT)] = Field(
        "auto", description=f"the number of trajectories, 1 or more, {MOST_COUNT} at most, or auto"
    )
    selection: Literal["tap", "kmeans", "uniform", "random"] = Field(
        "tap",
        description="tap (of clusters alike and near in time), kmeans, uniform (of every step alike) or random: which "
        "latents of the trajectories quantization is decided on",
    )
    samples: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_COUNT)] = Field(
        "auto", description=f"the number of these latents, 1 or more, {MOST_COUNT} at most, or auto"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="the seed of the trajectories, 0 or larger, below 2**63")


class Quantization(_Section):
    """Arithmetic of 8 bits and fewer in the linear layers of the blocks."""

    bits: Annotated[str, _fits(_BITS, _MIXED, _AUTO, _FLOAT8, word="off")] = Field(
        "w8a8",
        description="off; w{2..8}a{2..8}: the bits of weights and activations, for example w8a8; auto=B: 4, 6 or 8 for "
        "each layer and timestep group, B (4 to 8) on average; auto: as few as meet the gate; or fp8: 8-bit floating "
        "point (E4M3), whose scales cover the range and whose weights are rounded to the nearest",
    )
    groups: int = Field(
        8,
        ge=1,
        le=MOST_STEPS,
        description="the number of timestep groups with activation scales of their own, 1 or more, "
        f"{MOST_STEPS} at most",
    )
    grouping: Literal["optimal", "uniform"] = Field("optimal", description="optimal or uniform")
    equalize: bool = Field(
        True, description="true or false: whether channels of activations share a range, at no cost when they run"
    )
    scales: Literal["auto", "fisher", "range"] = Field(
        "auto",
        description="fisher (searched by what errors do to the prediction), range (covering the range), or auto, which "
        "is fisher for activations of fewer than 8 bits",
    )
    regions: Literal["auto"] | bool = Field(
        "auto",
        description="auto, true or false: whether an activation after a GELU, and probabilities of quantized "
        "attention, may have two steps, where that pays; auto is where the target can hold that",
    )
    attention: bool = Field(
        False,
        description="true or false: whether products of attention are quantized too, which gains no time on CPUs",
    )
    rounding: Literal["feedback", "search", "nearest"] = Field(
        "feedback",
        description="feedback (weights make up for each other's errors), search (scales by the error of results) or "
        "nearest (scales that cover the largest weight)",
    )
    correction: Literal["all", "consumers", "off"] = Field(
        "all",
        description="all, consumers or off: which layers have their results corrected, at no cost when they run; "
        "consumers are those of the block after a cached range",
    )


class SolverChoice(_Section):
    """The sampler's updates: those of the scheduler, or fewer ones with fitted coefficients."""

    mode: Annotated[str, _fits(_FITTED, word="as-is")] = Field(
        "as-is",
        description="as-is (the scheduler's own steps and updates); fitted (fewer steps, with updates that are fitted "
        "to a target run); or fitted=K: K of them",
    )
    target: Literal["converged", "run"] = Field(
        "converged",
        description="converged (the trajectory that solvers converge to with many steps) or run (the run of the "
        "scheduler as it is): what a fitted solver follows",
    )
    history: int = Field(
        3, ge=0, le=3, description="the number of earlier predictions that a fitted update may use, 0 to 3"
    )


class Cache(_Section):
    """The computing steps, and the blocks that reusing steps skip."""

    schedule: Annotated[str, _fits(*_SCHEDULES, word="off"), AfterValidator(_readable_plan)] = Field(
        "off",
        description="off; auto: the steps of a fitted solver may reuse the difference of the halves of guidance, more "
        "steps for the same work, where that comes closer to its target; interval=N: every N-th step computes, the "
        "others reuse; dps=N: as many computing steps, placed by CacheQuant's rule; budget=F: the best cache schedule "
        "at the fraction F of the cost, 0.3 for example; or plan=TEXT: a given cache schedule, such as 980-20:FRRF "
        "(see qcgraph passes apply-plan)",
    )
    forecast: str = Field(
        "auto",
        min_length=1,
        max_length=MOST_NAME,
        description="auto, or the name of a forecaster, affine for example (see qcgraph passes fit-forecast): how "
        "cached values are forecast; auto is affine under a budget or a plan, else reuse",
    )
    blocks: Annotated[str, _fits(_BLOCKS, word="all"), AfterValidator(_rising)] = Field(
        "all",
        description="all, or FIRST..LAST: the cached blocks, counted from 0, the last one inclusive; or guidance: the "
        "difference of its halves; several with +",
    )
    what: Literal["range", "branches"] = Field(
        "range", description="range (the change of the residual stream over the blocks) or branches (their outputs)"
    )
    memory: int = Field(
        0,
        ge=0,
        le=MOST_MEMORY,
        description="bytes that cached tensors may take for one image, both halves of guidance; 0: any number",
    )
    cost: Literal["latency", "macs"] = Field(
        "latency",
        description="latency (measured on the runtime that the target is judged on) or macs: what a budget is a "
        "fraction of",
    )
    rounds: int = Field(
        0,
        ge=0,
        le=MOST_COUNT,
        description=f"cache schedules to try by hill climbing under a budget, 0 or more, {MOST_COUNT} at most",
    )


class ModulationChoice(_Section):
    """The embedders and adaLN projections, which depend on timestep and conditions alone."""

    hoist: bool = Field(
        False, description="true or false: whether it is computed ahead of the steps, for many of them at once"
    )


class CompensationSection(_Section):
    """The compensation of errors after quantization and caching."""

    mode: Literal["off", "vc", "vc-masked"] = Field(
        "off", description="off, vc (variance compensation), or vc-masked (its weighted least-squares form)"
    )
    clamp: float = Field(
        0.1, ge=0, lt=1, description="how far a gain may be from 1, at least 0 and below 1; 0.1 is 0.9 to 1.1"
    )


class TargetChoice(_Section):
    """The target of the export, and the floating-point type."""

    name: str = Field("onnxruntime-cpu", min_length=1, description="the name of a target; `qcgraph targets` lists them")
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="type of what is not quantized; auto is what the target is fastest with and can hold"
    )


class PipelineChoice(_Section):
    """A pipeline in place of the default one."""

    passes: str = Field(
        "",
        description="the text of a pipeline in place of the default one, or nothing; what the target asks for and it "
        "lacks comes after it",
    )


def _readable(value: str) -> str:
    if value:
        Gate.parse(value)
    return value


class GateChoice(_Section):
    """The conditions that a compilation has to meet before its bundle is written."""

    terms: Annotated[str, AfterValidator(_readable)] = Field(
        "", description=f'nothing, or conditions such as "psnr>=28,accuracy_drop<=0.01" on {", ".join(TERMS)}'
    )
    allow_unsafe: bool = Field(
        False, description="true or false: whether a cache that carries more quantization noise than change is allowed"
    )
    verdict: bool = Field(
        True, description="true or false: whether the bundle is compared with plain solvers of equal time at the end"
    )


class Recipe(_Section):
    """All settings of a compilation.

    Attributes:
        sampling: scheduler, steps and guidance.
        solver: the updates of the steps.
        calibration: the observed trajectories.
        quantization: bits and timestep groups.
        cache: the cache schedule and the blocks.
        modulation: whether embedders and adaLN projections are computed ahead of the steps.
        compensation: variance compensation.
        target: form of graphs, form of quantization, and runtime.
        gate: conditions on quality, and whether unsafe combinations are allowed.
        pipeline: a pipeline in place of the default one.
    """

    # The options of the command line, each with its section and key.
    OPTIONS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "steps": ("sampling", "steps"),
        "scheduler": ("sampling", "scheduler"),
        "guidance": ("sampling", "guidance"),
        "solver": ("solver", "mode"),
        "solver_target": ("solver", "target"),
        "bits": ("quantization", "bits"),
        "groups": ("quantization", "groups"),
        "cache": ("cache", "schedule"),
        "forecast": ("cache", "forecast"),
        "cache_budget": ("cache", "memory"),
        "hoist_adaln": ("modulation", "hoist"),
        "compensate": ("compensation", "mode"),
        "target": ("target", "name"),
        "precision": ("target", "precision"),
        "seed": ("calibration", "seed"),
        "gate": ("gate", "terms"),
        "allow_unsafe": ("gate", "allow_unsafe"),
        "verdict": ("gate", "verdict"),
    }

    # Components that --ablate switches off, each with the keys and values for it.
    COMPONENTS: ClassVar[Mapping[str, Mapping[tuple[str, str], object]]] = {
        "tgq": {("quantization", "groups"): 1},
        "mrq": {("quantization", "regions"): False},
        "ho": {("quantization", "scales"): "range"},
        "tap": {("calibration", "selection"): "random"},
        "vc": {("compensation", "mode"): "off"},
        "dec": {("quantization", "correction"): "off"},
        "equalize": {("quantization", "equalize"): False},
        "feedback": {},  # changes the rounding, see `_rounding_without`
    }

    sampling: Sampling = Sampling()
    solver: SolverChoice = SolverChoice()
    calibration: Calibration = Calibration()
    quantization: Quantization = Quantization()
    cache: Cache = Cache()
    modulation: ModulationChoice = ModulationChoice()
    compensation: CompensationSection = CompensationSection()
    target: TargetChoice = TargetChoice()
    gate: GateChoice = GateChoice()
    pipeline: PipelineChoice = PipelineChoice()

    @classmethod
    def of(cls, given: Recipe | str | os.PathLike[str] | Mapping[str, Any] | None) -> Recipe:
        """Return the recipe of a Recipe, the name of a preset, a path of a TOML file, a dict of sections, or None.

        Args:
            given: the caller's recipe in one of these forms; None stands for the defaults.

        Raises:
            UsageError: the type is none of these, or `load` and `from_toml` refuse the recipe.
        """
        if given is None or isinstance(given, Recipe):
            return given or cls()
        if isinstance(given, Mapping):
            return cls._validated(dict(given), where="recipe")
        if isinstance(given, str | os.PathLike):
            return cls.load(given)
        raise UsageError(
            f"a recipe cannot be {shown(given)}",
            where="recipe",
            hint='give a Recipe, the name of a preset, the path of a TOML file, or a dict such as {"sampling": '
            '{"steps": 20}}; the text of a pipeline goes there as {"pipeline": {"passes": TEXT}}',
        )

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Recipe:
        """Return the preset of a name, or the recipe in a TOML file.

        Raises:
            UsageError: there is no such preset or file, it cannot be read, or it holds an unknown key or wrong value.
        """
        name_or_path = os.fsdecode(name_or_path)
        if name_or_path in preset_names():
            return cls.from_toml((PRESETS / f"{name_or_path}.toml").read_text("utf-8"), where=name_or_path)
        path = Path(name_or_path)
        if path.suffix != ".toml" and not os.path.lexists(path):
            raise UsageError(f"unknown recipe {shown(name_or_path)}", hint=_preset_hint(name_or_path))
        data = read_toml(path, hint=f"a recipe is a TOML file or a preset: {_preset_hint(name_or_path)}")
        return cls._validated(data, where=name_or_path)

    @classmethod
    def from_toml(cls, text: str, *, where: str = "recipe") -> Recipe:
        """Return the recipe of a TOML text; missing keys keep their defaults.

        Args:
            text: the TOML.
            where: the source for errors, a file name for example.

        Raises:
            UsageError: the text is not TOML, or it holds an unknown key or a wrong value.
        """
        data = parse_toml(text, where=where, hint='strings need quotes: bits = "w8a8"')
        return cls._validated(data, where=where)

    def override(self, **options: object) -> Recipe:
        """Return this recipe with options of the command line on top; options that are None change nothing.

        Args:
            options: values by the names in `OPTIONS`, for example ``steps=20, bits="w6a6"``.

        Raises:
            UsageError: an option is unknown, or its value is wrong.
        """
        data = self.model_dump()
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in given.items():
            if name not in self.OPTIONS:
                raise UsageError(f"unknown option {name!r}", hint=closest(name, self.OPTIONS))
            section, key = self.OPTIONS[name]
            data[section][key] = value
        flags = {self.OPTIONS[name]: f"--{name.replace('_', '-')}" for name in given}
        return self._validated(data, where="recipe", flags=flags)

    def to_toml(self) -> str:
        """Return the whole recipe as TOML, defaults included; `from_toml` is the inverse."""
        import tomli_w

        return tomli_w.dumps(self.model_dump())

    def ablated(self, components: Sequence[str]) -> Recipe:
        """Return this recipe with components switched off.

        Args:
            components: names in `COMPONENTS`.

        Raises:
            UsageError: a component is unknown, or the recipe brings its own pipeline.
        """
        if components and self.pipeline.passes:
            raise UsageError(
                "the recipe has a pipeline of its own", where="--ablate", hint="take the passes out of pipeline.passes"
            )
        data = self.model_dump()
        for name in components:
            if name not in self.COMPONENTS:
                raise UsageError(f"unknown component {name!r}", where="--ablate", hint=closest(name, self.COMPONENTS))
            for (section, key), value in self.COMPONENTS[name].items():
                data[section][key] = value
        data["quantization"]["rounding"] = self._rounding_without(components)
        return self._validated(data, where="--ablate")

    def _rounding_without(self, components: Sequence[str]) -> str:
        """Return how weights are rounded without these components; the search of scales is the other half of HO."""
        rounding = self.quantization.rounding
        if rounding == "feedback" and "feedback" in components:
            rounding = "search"
        return "nearest" if rounding == "search" and "ho" in components else rounding

    @property
    def overruled(self) -> tuple[str, ...]:
        """The settings that were changed and have no effect, because a pipeline of the recipe's own decides them."""
        if not self.pipeline.passes:
            return ()
        given, defaults = self.model_dump(), type(self)().model_dump()
        changed = (
            f"{section}.{key}"
            for section in ("solver", "calibration", "quantization", "cache", "modulation", "compensation")
            for key, value in given[section].items()
            if value != defaults[section][key]
        )
        return tuple(key for key in changed if key != "calibration.seed")  # cached values are checked with it, too

    @property
    def is_quantized(self) -> bool:
        """Whether layers multiply numbers of at most 8 bits."""
        return self.quantization.bits != "off"

    @property
    def is_float8(self) -> bool:
        """Whether quantized numbers are floating point."""
        return bool(_FLOAT8.fullmatch(self.quantization.bits))

    @property
    def weight_bits(self) -> int:
        """The largest number of bits of a quantized weight."""
        match = _BITS.fullmatch(self.quantization.bits)
        return int(match[1]) if match else MOST_BITS

    @property
    def activation_bits(self) -> int:
        """The largest number of bits of a quantized activation."""
        match = _BITS.fullmatch(self.quantization.bits)
        return int(match[2]) if match else MOST_BITS

    @property
    def bit_budget(self) -> float | None:
        """The mean number of bits over layers and timestep groups; None when all have the same number."""
        match = _MIXED.fullmatch(self.quantization.bits)
        return float(match[1]) if match else None

    @property
    def searches_scales(self) -> bool:
        """Whether scales of activations are searched; at 8 bits, those that cover the range are as good, and safer."""
        asked = self.quantization.scales
        return asked == "fisher" or (asked == "auto" and self.has_low_bits)

    @property
    def has_low_bits(self) -> bool:
        """Whether activations may have fewer than 8 bits."""
        return self.bit_budget is not None or self.activation_bits < MOST_BITS

    @property
    def is_fitted(self) -> bool:
        """Whether the sampler's updates are fitted."""
        return bool(_FITTED.fullmatch(self.solver.mode))

    @property
    def fitted_steps(self) -> int | None:
        """The number of steps of a fitted solver, None where it is left to the pass."""
        match = _FITTED.fullmatch(self.solver.mode)
        return int(match[1]) if match and match[1] else None

    @property
    def is_cached(self) -> bool:
        """Whether some steps may be reusing steps."""
        return self.cache.schedule != "off" and (not self.is_cached_by_solver or self.sampling.guidance != 1)

    @property
    def is_cached_by_solver(self) -> bool:
        """Whether the plan of a fitted solver decides which steps reuse."""
        return self.cache.schedule == AUTO

    @property
    def cache_interval(self) -> int | None:
        """The steps per computing step, evenly spaced or not; None with the cache off, a budget or a plan."""
        match = _INTERVAL.fullmatch(self.cache.schedule)
        return int(match[2]) if match else None

    @property
    def cache_budget(self) -> float | None:
        """The largest cost of sampling, relative to computing every step; None when the recipe sets no budget."""
        match = _BUDGET.fullmatch(self.cache.schedule)
        return float(match[1]) if match else None

    @property
    def is_searched(self) -> bool:
        """Whether measurements decide the cache schedule: ``dps=N`` or ``budget=F``."""
        return self.cache_budget is not None or self.cache.schedule.startswith("dps=")

    @property
    def given_plan(self) -> str | None:
        """The text of a given cache schedule (see `qcgraph.plan.schedule.TimedSchedule`), None without one."""
        match = _PLAN.fullmatch(self.cache.schedule)
        return match[1] if match else None

    @property
    def forecast(self) -> str:
        """The name of the forecaster of cached values."""
        if self.cache.forecast != "auto":
            return self.cache.forecast
        return "reuse" if self.cache_budget is None and self.given_plan is None else "affine"

    @property
    def conditions(self) -> Gate | None:
        """The gate that quality has to meet, if any."""
        return Gate.parse(self.gate.terms) if self.gate.terms else None

    @classmethod
    def _validated(
        cls, data: Mapping[str, Any], *, where: str, flags: Mapping[tuple[str, str], str] | None = None
    ) -> Recipe:
        flags = flags or {}
        for section, keys in data.items():
            entries = keys.items() if isinstance(keys, Mapping) else ()
            for text in (section, *(text for entry in entries for text in entry)):
                if isinstance(text, str) and not is_text(text):  # neither pydantic nor a file can hold it
                    raise UsageError(f"{shown(text)} is no text", where=where, hint="write it in UTF-8, without NUL")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _usage_error(error, where, flags) from None


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets that ship with the package."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def _preset_hint(asked: str) -> str:
    return f"{closest(asked, preset_names())}; or give the path of a TOML file"


def _usage_error(error: ValidationError, where: str, flags: Mapping[tuple[str, str], str]) -> UsageError:
    """Return an error for the first finding of pydantic, in the words of the recipe: a key or a section."""
    first = error.errors()[0]
    section, *rest = (str(part) for part in first["loc"])
    sections = Recipe.model_fields
    if section not in sections:
        owners = [name for name in sections if section in _keys_of(name)]
        hint = f"{section} belongs in the section [{owners[0]}]" if owners else closest(section, sections)
        return UsageError(f"unknown section {shown(section)}", where=where, hint=hint)
    if not rest:
        return UsageError(
            "is a section, not a value", where=f"{where}, {section}", hint=f"write [{section}], then its keys"
        )
    key = rest[0]
    if key not in _keys_of(section):
        hint = f"{closest(key, _keys_of(section))} (section [{section}])"
        return UsageError(f"unknown key {shown(key)}", where=f"{where}, [{section}]", hint=hint)
    flag = flags.get((section, key))
    name = flag or f"{section}.{key}"
    description = _keys_of(section)[key].description
    guess = ""
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        known = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        guess = closest(first["input"], known).partition("known: ")[0]
    return UsageError(
        f"{shown(first['input'])} does not fit",
        where=flag or f"{where}, {name}",
        hint=f"{guess}{name} is {description}",
    )


def _keys_of(section: str) -> Mapping[str, Any]:
    kind = Recipe.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, BaseModel)
    return kind.model_fields
