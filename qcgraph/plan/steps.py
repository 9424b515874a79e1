"""The step plan: which variant, timestep group and coefficients every sampling step uses. Plain data, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from string import ascii_uppercase
from typing import Literal

from qcgraph.errors import BundleError, UsageError, shown
from qcgraph.plan.roles import COMPUTES, VariantKind, VariantRole

CAPTURED = "main"  # the variant of a captured program


@dataclass(frozen=True)
class Earlier:
    """The contribution of an earlier step to an update: ``latent * x + noise_prediction * eps``, both of that step."""

    latent: float
    noise_prediction: float


@dataclass(frozen=True)
class Update:
    """A linear sampler update: ``x' = latent * x + noise_prediction * eps + noise * z``, z ~ N(0, I), plus history.

    Attributes:
        latent: the coefficient of x, the latent that the denoiser was given.
        noise_prediction: the coefficient of eps, the guided noise prediction.
        noise: the coefficient of z, fresh noise.
        history: the contributions of earlier steps, the latest first; empty where the update uses none. A multistep
            solver combines its last predictions of the clean latent, each of which is linear in the x and eps of its
            step.
    """

    latent: float
    noise_prediction: float
    noise: float = 0.0
    history: tuple[Earlier, ...] = ()


@dataclass(frozen=True)
class Step:
    """One sampling step.

    Attributes:
        timestep: the timestep value that the denoiser is called with; the key of the plan.
        update: the sampler update that follows the denoiser.
        variant: the graph that computes this step.
        group: the timestep group whose activation scales this step uses.
        row: the row of the coefficient tables (compensation) of this step.
    """

    timestep: float
    update: Update
    variant: str = CAPTURED
    group: int = 0
    row: int = 0


@dataclass(frozen=True)
class Fingerprint:
    """The settings that a plan was made for; any other settings are refused.

    Attributes:
        model: sha256 of the model's weights, 16 hexadecimal digits.
        scheduler: the scheduler's name.
        steps: the number of sampling steps.
        guidance: the weight of classifier-free guidance; 1 means no guidance.
        solver: ``as-is`` where the updates are those of the scheduler; ``fitted`` where the plan stands for a run of
            ``steps`` steps with fewer steps and fitted updates.
    """

    model: str
    scheduler: str
    steps: int
    guidance: float
    solver: Literal["as-is", "fitted"] = "as-is"


@dataclass(frozen=True)
class StepPlan:
    """The steps of one sampling trajectory, first (noisiest) to last.

    Attributes:
        fingerprint: the settings that the plan was made for.
        steps: the steps.
        roles: the role of each variant, including variants that no step runs.

    Raises:
        UsageError: there are no steps, the timesteps do not fall, a step runs a variant without a role or one that
            prepares another, or not exactly one variant computes.
    """

    fingerprint: Fingerprint
    steps: tuple[Step, ...]
    roles: dict[str, VariantRole] = field(default_factory=lambda: {CAPTURED: COMPUTES})

    def __post_init__(self) -> None:
        if not self.steps:
            raise UsageError("a step plan needs at least one step")
        timesteps = [step.timestep for step in self.steps]
        if any(later >= earlier for earlier, later in pairwise(timesteps)):
            raise UsageError(
                "the timesteps of a plan must fall strictly", hint="use a scheduler that visits each timestep once"
            )
        runs = {name for name, role in self.roles.items() if role.kind is not VariantKind.PREPARES}
        if unknown := [name for name in self.variants if name not in runs]:
            raise UsageError(f"a step runs {unknown[0]!r}, which is no variant of steps", hint="give it a role")
        if len(self._of_kind(VariantKind.COMPUTES)) != 1:
            raise UsageError("not exactly one variant computes", hint="give one variant the role of computing")

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def is_fitted(self) -> bool:
        """Whether the plan stands for a run of more steps, with updates that were fitted to it."""
        return self.fingerprint.solver == "fitted"

    @property
    def halves(self) -> int:
        """How often the denoiser runs on every latent of a step: twice under guidance."""
        return 1 if self.fingerprint.guidance == 1.0 else 2

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep values, falling."""
        return tuple(step.timestep for step in self.steps)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants in use, in order of first use."""
        return tuple(dict.fromkeys(step.variant for step in self.steps))

    @property
    def computing(self) -> str:
        """The variant that computes the whole network."""
        (name,) = self._of_kind(VariantKind.COMPUTES)
        return name

    @property
    def reusing(self) -> tuple[str, ...]:
        """The variants that take cached values in place of the operations that they skip."""
        return self._of_kind(VariantKind.REUSES, VariantKind.HALF)

    @property
    def preparing(self) -> Mapping[str, str]:
        """The variant that computes the modulation, by the name of the variant that takes it."""
        return {role.of: name for name, role in self.roles.items() if role.kind is VariantKind.PREPARES}

    @property
    def restores_half(self) -> bool:
        """Whether a variant computes one half of guidance alone, so that every batch must hold both."""
        return bool(self._of_kind(VariantKind.HALF))

    def _of_kind(self, *kinds: VariantKind) -> tuple[str, ...]:
        return tuple(name for name, role in self.roles.items() if role.kind in kinds)

    def computes(self, index: int) -> bool:
        """Tell whether a step computes the whole network."""
        return self.roles[self.steps[index].variant].kind is VariantKind.COMPUTES

    def serves(self, variant: str) -> str:
        """Return the variant of the steps that a variant runs for: itself, or the one that it prepares."""
        return self.roles[variant].of or variant

    def uses(self, variant: str) -> int:
        """Count the steps that a variant runs, or that it prepares."""
        return sum(step.variant == self.serves(variant) for step in self.steps)

    def work(self, macs: Mapping[str, float]) -> float:
        """Return the work of all steps.

        Args:
            macs: the multiply-accumulates of one run of each variant.
        """
        return sum(count * self.uses(name) for name, count in macs.items())

    def work_ratio(self, macs: Mapping[str, float], whole: float) -> float:
        """Return the work of all steps relative to that of the scheduler's run; 1 if the model has no products.

        Args:
            macs: the multiply-accumulates of one run of each variant.
            whole: those of one run of the captured model.
        """
        return self.work(macs) / (whole * self.fingerprint.steps) if whole else 1.0

    @property
    def group_count(self) -> int:
        """The number of timestep groups."""
        return 1 + max(step.group for step in self.steps)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the steps of every timestep group."""
        return tuple(
            tuple(index for index, step in enumerate(self.steps) if step.group == group)
            for group in range(self.group_count)
        )

    def index_of(self, timestep: float) -> int:
        """Return the position of a timestep value in the plan.

        Raises:
            BundleError: the plan has no such timestep.
        """
        try:
            return self.timesteps.index(float(timestep))
        except (ValueError, TypeError, OverflowError):  # of the index, or because it is not a number
            raise BundleError(
                f"timestep {_number_text(timestep)} is not in the plan ({self.describe()}), which visits "
                f"{', '.join(f'{value:g}' for value in self.timesteps[:3])}{' ..' * (len(self) > 3)}",
                hint="sample with the scheduler and step count of the plan (FittedScheduler of qcgraph.schedulers has "
                "both), or compile for the ones you use",
            ) from None

    @property
    def modes(self) -> tuple[str | None, ...]:
        """The mode of each step: None where it computes, else the name of the reusing variant."""
        return tuple(None if self.computes(index) else step.variant for index, step in enumerate(self.steps))

    def with_modes(self, modes: Sequence[str | None]) -> StepPlan:
        """Return this plan with every step computing (None), or reusing in a variant."""
        return self.with_variants([mode or self.computing for mode in modes])

    def with_variants(self, variants: Sequence[str]) -> StepPlan:
        """Return this plan with the given variant at each step."""
        return replace(
            self,
            steps=tuple(replace(step, variant=name) for step, name in zip(self.steps, variants, strict=True)),
        )

    @property
    def all_computing(self) -> StepPlan:
        """This plan with every step computing."""
        return self.with_variants([self.computing] * len(self))

    def with_groups(self, groups: Sequence[int]) -> StepPlan:
        """Return this plan with the given timestep group at each step."""
        return replace(
            self,
            steps=tuple(replace(step, group=group) for step, group in zip(self.steps, groups, strict=True)),
        )

    def require(self, *, steps: int | None = None, scheduler: str | None = None, guidance: float | None = None) -> None:
        """Refuse settings that this plan was not made for; None means "as planned".

        Raises:
            BundleError: a setting differs from the plan's.
        """
        asked = {"steps": steps, "scheduler": scheduler, "guidance": guidance}
        for name, value in asked.items():
            planned = getattr(self.fingerprint, name)
            if value is not None and value != planned:
                raise BundleError(
                    f"the plan was made for {name} = {planned}, not {value}",
                    where="plan.json",
                    hint=f"leave {name} out, or compile again with {name} = {value}",
                )

    def schedule(self) -> str:
        """Return the variants as one letter a step: ``FRRFRR   (F = full, R = reuse)``."""
        letters: dict[str, str] = {}
        for name in self.variants:
            free = (letter for letter in name.upper() + ascii_uppercase if letter not in letters.values())
            letters[name] = next(letter for letter in free if letter.isalpha())
        legend = ", ".join(f"{letter} = {name}" for name, letter in letters.items())
        return f"{''.join(letters[step.variant] for step in self.steps)}   ({legend})"

    def describe(self) -> str:
        """Return one line: scheduler, steps, guidance."""
        mark = self.fingerprint
        steps = f"{len(self)} fitted of {mark.steps} steps" if self.is_fitted else f"{mark.steps} steps"
        return f"{mark.scheduler}, {steps}, guidance {mark.guidance:g}"

    def lines(self) -> list[str]:
        """Return the lines about this plan in the text of a program."""
        lines = [f"steps {self.describe()}, timesteps {self.timesteps[0]:g} .. {self.timesteps[-1]:g}"]
        if len(self.variants) > 1:
            lines.append(f"  variants {self.schedule()}")
        if self.group_count > 1:
            lines.append(f"  groups   {' '.join(str(step.group) for step in self.steps)}")
        return lines


def _number_text(value: object) -> str:
    """Return a number as people write it, and any other value as an error quotes it."""
    try:
        text = f"{value:g}"
        return text if float(text) == value else str(value)  # 750.0001 is not 750
    except (ValueError, TypeError, OverflowError):
        return shown(value)


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the sha256 of chunks, its first 16 hexadecimal digits."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()[:16]


def digest_of(value: object) -> str:
    """Return the digest of a value that JSON can hold."""
    return digest([json.dumps(value, sort_keys=True).encode()])
