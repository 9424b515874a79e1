"""Plans as files: a bundle's ``plan.json``, or TOML that a person writes, with a line for every timestep.

::

    model = "0123456789abcdef"
    scheduler = "ddim"
    steps = 50
    guidance = 1.5

    [timesteps]
    980 = "full"
    960 = "reuse"

Only ``[timesteps]`` is required. All other keys are checked: a plan that names a model is for that model alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qcgraph.bundle import Bundle
from qcgraph.bundle.manifest import PLAN
from qcgraph.bundle.read import decode_plan
from qcgraph.errors import BundleError, UsageError, closest, shown
from qcgraph.files.documents import parse_json, parse_toml, read_text
from qcgraph.files.folder import parsed
from qcgraph.plan.schedule import TimedSchedule
from qcgraph.plan.schedule.timed import COMPUTES_WORD
from qcgraph.plan.steps import Step, StepPlan

MOST_PLAN_BYTES = 2**24  # bytes; the plan.json of a thousand steps is below 1 MB
WRITE_HINT = "qcgraph inspect BUNDLE --show plan prints a plan to edit"
HEADING = """\
# What every timestep does: full computes; reuse carries on what was last computed. Edit it, then compile with
# --plan FILE: at other steps, or with another scheduler, as large a share of them computes, as densely at each time.
# Without the line `model`, any model may follow it.
"""


@dataclass(frozen=True)
class PlanFile:
    """A cache schedule from a file or a bundle, and the model and sampling that it was made for.

    Attributes:
        schedule: the mode of every timestep.
        where: the file, for errors.
        model: the digest of the weights that it was made for; empty where it is for any model.
        scheduler: the scheduler that it was made for, if known.
        guidance: the weight of guidance that it was made for, if known.
    """

    schedule: TimedSchedule
    where: str
    model: str = ""
    scheduler: str = ""
    guidance: float | None = None

    def check_model(self, digest: str) -> None:
        """Refuse a model that the plan was not made for.

        Args:
            digest: the digest of the model's weights.

        Raises:
            UsageError: the plan names another model.
        """
        if self.model and self.model != digest:
            raise UsageError(
                f"was made for another model: its weights have the digest {self.model}, not {digest}",
                where=self.where,
                hint="plan for this model (--cache budget=0.3), or follow it all the same: take the line `model` out "
                f"of the plan file ({WRITE_HINT})",
            )

    def describe(self) -> str:
        """Return scheduler, steps and guidance in one line, where they are known."""
        guidance = "" if self.guidance is None else f"guidance {self.guidance:g}"
        parts = (self.scheduler, f"{len(self.schedule.timesteps)} steps", guidance)
        return ", ".join(part for part in parts if part)


def read_plan(path: Path) -> PlanFile:
    """Return the plan in a file or a bundle.

    Args:
        path: a bundle's folder, a ``plan.json``, or a TOML file (JSON with the same keys is read too).

    Raises:
        UsageError: there is no such file, or it cannot be read, or its schedule cannot be followed.
        BundleError: the bundle, or the ``plan.json``, is damaged.
    """
    if os.path.isdir(path):  # noqa: PTH112 - raises for no path
        return _of_bundle(Bundle.open(path, check=False).plan, str(path / PLAN))
    where = str(path)
    if not os.path.lexists(path):
        raise UsageError("there is no such plan", where=where, hint=f"give a bundle or a file; {WRITE_HINT}")
    text = read_text(path, hint=WRITE_HINT, most_bytes=MOST_PLAN_BYTES)
    if not text.lstrip().startswith("{"):
        hint = 'a line is 980 = "full", every timestep is there once'
        return _of_data(parse_toml(text, where=where, hint=hint), where)
    data = parse_json(text, where=where, hint=WRITE_HINT)
    if "plan" not in data:
        return _of_data(data, where)
    _check_steps(data["plan"], where)
    return _of_bundle(parsed(where, text, decode_plan)[1], where)


def plan_data(plan: StepPlan) -> dict[str, Any]:
    """Return the cache schedule of a step plan as data, in the keys of a plan file."""
    mark = plan.fingerprint
    return {
        "model": mark.model,
        "scheduler": mark.scheduler,
        "steps": len(plan),
        "guidance": mark.guidance,
        "timesteps": {
            f"{step.timestep!r}".removesuffix(".0"): mode or COMPUTES_WORD
            for step, mode in zip(plan.steps, plan.modes, strict=True)
        },
    }


def plan_toml(data: dict[str, Any]) -> str:
    """Return the data of `plan_data` as the text of a plan file, which `read_plan` reads."""
    head = [f"{key} = {json.dumps(value)}" for key, value in data.items() if key != "timesteps"]
    lines = [
        f"{key if key.isdecimal() else json.dumps(key)} = {json.dumps(mode)}" for key, mode in data["timesteps"].items()
    ]
    return "\n".join([HEADING + "\n".join(head), "", "[timesteps]", *lines, ""])


class _Written(BaseModel):
    """The keys of a plan file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    timesteps: dict[str, str]
    model: str = ""
    scheduler: str = ""
    steps: int | None = None
    guidance: float | None = None


def _of_data(data: Any, where: str) -> PlanFile:
    try:
        written = _Written.model_validate(data)
    except ValidationError as error:
        raise _usage_error(error, where) from None
    count = len(written.timesteps)
    if written.steps is not None and written.steps != count:
        raise UsageError(
            f"says {written.steps} steps, and lists {count} timesteps",
            where=where,
            hint="a timestep is missing or too many; without the line `steps` any number will do",
        )
    timesteps = tuple(_timestep(key, where) for key in written.timesteps)
    modes = tuple(None if word == COMPUTES_WORD else word for word in written.timesteps.values())
    schedule = _schedule(timesteps, modes, where)
    return PlanFile(schedule, where, written.model, written.scheduler, written.guidance)


def _of_bundle(plan: StepPlan, where: str) -> PlanFile:
    schedule = _schedule(plan.timesteps, plan.modes, where)
    mark = plan.fingerprint
    return PlanFile(schedule, where, mark.model, mark.scheduler, mark.guidance)


def _schedule(timesteps: tuple[float, ...], modes: tuple[str | None, ...], where: str) -> TimedSchedule:
    try:
        return TimedSchedule(timesteps, modes)
    except UsageError as error:
        raise UsageError(error.message, where=where, hint=error.hint) from None


def _timestep(key: str, where: str) -> float:
    try:
        return float(key)
    except ValueError:
        raise UsageError(f"{shown(key)} is no timestep", where=where, hint='a line is 980 = "full"') from None


def _check_steps(plan: Any, where: str) -> None:
    """Refuse a ``plan.json`` with a misspelled key of a step, since the step would silently keep a default."""
    known = {item.name for item in fields(Step)}
    steps = plan.get("steps") if isinstance(plan, dict) else None
    for index, step in enumerate(steps if isinstance(steps, list) else ()):
        for key in step if isinstance(step, dict) else ():
            if key not in known:
                raise BundleError(
                    f"step {index} has the unknown key {shown(key)}", where=where, hint=closest(key, known)
                )


def _usage_error(error: ValidationError, where: str) -> UsageError:
    """Return an error for pydantic's finding; an unknown key comes first, since it may explain a missing one."""
    found = error.errors()
    first = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UsageError(f"unknown key {shown(place)}", where=where, hint=closest(place, _Written.model_fields))
    if place.startswith("timesteps."):
        hint = 'a line is 980 = "full"; a timestep with a fraction needs quotes: "979.5" = "full"'
        return UsageError(f"{place}: {shown(first['input'])} is no mode", where=where, hint=hint)
    return UsageError(f"{place or 'the file'}: {first['msg'].lower()}", where=where, hint=WRITE_HINT)
