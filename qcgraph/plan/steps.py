"""The step plan: which variant, timestep group and coefficients every sampling step uses. Plain data, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from string import ascii_uppercase

from qcgraph.errors import BundleError, UsageError, shown
from qcgraph.plan.spec import preparation


@dataclass(frozen=True)
class Earlier:
    """What an earlier step still adds to an update: ``latent * x + noise_prediction * eps``, both of that step."""

    latent: float
    noise_prediction: float


@dataclass(frozen=True)
class Update:
    """A linear sampler update: ``x' = latent * x + noise_prediction * eps + noise * z``, z ~ N(0, I), plus history.

    Attributes:
        latent: the coefficient of x, the latent that the denoiser was given.
        noise_prediction: the coefficient of eps, its guided noise prediction.
        noise: the coefficient of z, fresh noise.
        history: what earlier steps add, the latest first; nothing where the update has no memory. A multistep solver
            combines its last predictions of the clean latent, each of which is linear in the x and eps of its step.
    """

    latent: float
    noise_prediction: float
    noise: float = 0.0
    history: tuple[Earlier, ...] = ()


@dataclass(frozen=True)
class Step:
    """One sampling step.

    Attributes:
        timestep: the timestep value the denoiser is called with; the key of the plan.
        update: the sampler update that follows the denoiser.
        variant: the graph that computes this step.
        group: the timestep group whose activation scales this step uses.
        row: the row of the coefficient tables (compensation) of this step.
    """

    timestep: float
    update: Update
    variant: str = "main"
    group: int = 0
    row: int = 0


@dataclass(frozen=True)
class Fingerprint:
    """What a plan was made for; anything else is refused.

    Attributes:
        model: sha256 of the model's weights, 16 hexadecimal digits.
        scheduler: the scheduler's name.
        steps: number of sampling steps.
        guidance: the weight of classifier-free guidance; 1 means none.
    """

    model: str
    scheduler: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class StepPlan:
    """The steps of one sampling trajectory, first (noisiest) to last.

    Attributes:
        fingerprint: what the plan was made for.
        steps: the steps.
        prepared: the variants that take a modulation, which others compute ahead (see `qcgraph.plan.spec.preparation`).
        paired: the variants that compute one half of guidance and restore the other: their batch must hold both.

    Raises:
        UsageError: there are no steps, or two steps share a timestep value.
    """

    fingerprint: Fingerprint
    steps: tuple[Step, ...]
    prepared: tuple[str, ...] = ()
    paired: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.steps:
            raise UsageError("a step plan needs at least one step")
        timesteps = [step.timestep for step in self.steps]
        if any(later >= earlier for earlier, later in pairwise(timesteps)):
            raise UsageError(
                "the timesteps of a plan must fall strictly", hint="use a scheduler that visits each timestep once"
            )

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def halves(self) -> int:
        """How often the denoiser sees every latent of a step: twice under guidance."""
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
        """The variant that the first step runs: it computes everything."""
        return self.steps[0].variant

    def uses(self, variant: str) -> int:
        """How many steps run a variant, or are prepared by it."""
        return sum(
            variant == step.variant or (step.variant in self.prepared and variant == preparation(step.variant))
            for step in self.steps
        )

    @property
    def group_count(self) -> int:
        """Number of timestep groups."""
        return 1 + max(step.group for step in self.steps)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The steps of every timestep group."""
        return tuple(
            tuple(index for index, step in enumerate(self.steps) if step.group == group)
            for group in range(self.group_count)
        )

    def index_of(self, timestep: float) -> int:
        """The position of a timestep value in the plan.

        Raises:
            BundleError: the plan has no such timestep.
        """
        try:
            return self.timesteps.index(float(timestep))
        except (ValueError, TypeError, OverflowError):  # of the index, or because it is no number at all
            raise BundleError(
                f"timestep {_number_text(timestep)} is not in the plan ({self.describe()}), which visits "
                f"{', '.join(f'{value:g}' for value in self.timesteps[:3])}{' ..' * (len(self) > 3)}",
                hint="sample with the scheduler and step count of the plan (make_scheduler of qcgraph.plan.schedulers "
                "makes it with its settings), or compile for the ones you use",
            ) from None

    def with_variants(self, variants: Sequence[str]) -> StepPlan:
        """This plan with another variant at each step."""
        return replace(
            self,
            steps=tuple(replace(step, variant=name) for step, name in zip(self.steps, variants, strict=True)),
        )

    def throughout(self, variant: str) -> StepPlan:
        """This plan with one variant at all steps."""
        return self.with_variants([variant] * len(self))

    def with_groups(self, groups: Sequence[int]) -> StepPlan:
        """This plan with another timestep group at each step."""
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
        """The variants as one letter a step: ``FRRFRR   (F = full, R = reuse)``."""
        letters: dict[str, str] = {}
        for name in self.variants:
            free = (letter for letter in name.upper() + ascii_uppercase if letter not in letters.values())
            letters[name] = next(letter for letter in free if letter.isalpha())
        legend = ", ".join(f"{letter} = {name}" for name, letter in letters.items())
        return f"{''.join(letters[step.variant] for step in self.steps)}   ({legend})"

    def describe(self) -> str:
        """One line: scheduler, steps, guidance."""
        mark = self.fingerprint
        return f"{mark.scheduler}, {mark.steps} steps, guidance {mark.guidance:g}"

    def lines(self) -> list[str]:
        """Return the lines that the text of a program has of it."""
        lines = [f"steps {self.describe()}, timesteps {self.timesteps[0]:g} .. {self.timesteps[-1]:g}"]
        if len(self.variants) > 1:
            lines.append(f"  variants {self.schedule()}")
        if self.group_count > 1:
            lines.append(f"  groups   {' '.join(str(step.group) for step in self.steps)}")
        return lines


def _number_text(value: object) -> str:
    """A number as people write it, and whatever else it may be as an error quotes it."""
    try:
        text = f"{value:g}"
        return text if float(text) == value else str(value)  # 750.0001 is not 750
    except (ValueError, TypeError, OverflowError):
        return shown(value)


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """sha256 over chunks, the first 16 hexadecimal digits."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()[:16]


def digest_of(value: object) -> str:
    """The digest of anything JSON can hold."""
    return digest([json.dumps(value, sort_keys=True).encode()])
