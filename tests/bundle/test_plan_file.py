"""Plan files: a bundle's plan.json, what a person writes, and what is wrong with either."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcgraph.bundle import write_plan
from qcgraph.bundle.plan_file import plan_data, plan_toml, read_plan
from qcgraph.errors import BundleError, QcgraphError, UsageError
from qcgraph.plan.roles import COMPUTES, REUSES
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update

SPEC = ModelSpec.class_conditional("toy", (1, 8, 8), 10, 10, 1)
UPDATE = Update(1.0, -0.1)
VARIANTS = ("full", "reuse", "reuse_1", "full")
WRITTEN = """\
model = "0123456789abcdef"
scheduler = "ddim"
steps = 3
guidance = 1.5

[timesteps]
900 = "full"
600 = "reuse"
300 = "full"
"""


@pytest.fixture
def plan() -> StepPlan:
    steps = [Step(900.0 - 100 * row, UPDATE, variant, row=row) for row, variant in enumerate(VARIANTS)]
    roles = {"full": COMPUTES, "reuse": REUSES, "reuse_1": REUSES}
    return StepPlan(Fingerprint("0123456789abcdef", "ddim", 4, 1.5), tuple(steps), roles)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write a file, and give its path."""

    def write(text: str) -> Path:
        path = tmp_path / "my-plan.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def refused(path: Path) -> QcgraphError:
    with pytest.raises(QcgraphError) as caught:
        read_plan(path)
    assert isinstance(caught.value, UsageError | BundleError)
    assert caught.value.where
    assert path.name in caught.value.where
    assert caught.value.hint
    return caught.value


def test_what_is_printed_can_be_read(plan: StepPlan, write: Callable[[str], Path]) -> None:
    text = plan_toml(plan_data(plan))
    assert '900 = "full"\n800 = "reuse"\n700 = "reuse_1"\n600 = "full"\n' in text
    read = read_plan(write(text))
    assert (read.schedule.timesteps, read.schedule.modes) == (plan.timesteps, (None, "reuse", "reuse_1", None))
    assert (read.model, read.scheduler, read.guidance) == ("0123456789abcdef", "ddim", 1.5)
    assert read.describe() == "ddim, 4 steps, guidance 1.5"


def test_as_json_too(plan: StepPlan, write: Callable[[str], Path]) -> None:
    read = [read_plan(write(text)) for text in (json.dumps(plan_data(plan)), plan_toml(plan_data(plan)))]
    assert read[0] == read[1]


def test_the_plan_of_a_bundle(plan: StepPlan, tmp_path: Path, write: Callable[[str], Path]) -> None:
    write_plan(tmp_path, SPEC, plan, {})
    read = read_plan(tmp_path / "plan.json")
    assert read.schedule == read_plan(write(plan_toml(plan_data(plan)))).schedule
    assert read.describe() == plan.describe()


def test_fractions_of_timesteps(write: Callable[[str], Path]) -> None:
    steps = tuple(Step(timestep, UPDATE, row=row) for row, timestep in enumerate((999.5, 499.1, 0.0)))
    plan = StepPlan(Fingerprint("m", "made up", 3, 1.0), steps)
    text = plan_toml(plan_data(plan))
    assert '"999.5" = "full"\n"499.1" = "full"\n0 = "full"\n' in text
    assert read_plan(write(text)).schedule.timesteps == plan.timesteps


def test_timesteps_alone_will_do(write: Callable[[str], Path]) -> None:
    read = read_plan(write('[timesteps]\n900 = "full"\n100 = "reuse"\n'))
    assert (read.schedule.text, read.describe()) == ("900-800:FR", "2 steps")
    read.check_model("any")


def test_a_model_that_is_named_is_the_only_one(write: Callable[[str], Path]) -> None:
    read = read_plan(write(WRITTEN))
    read.check_model("0123456789abcdef")
    with pytest.raises(UsageError, match="digest 0123456789abcdef, not fedcba9876543210") as caught:
        read.check_model("fedcba9876543210")
    assert caught.value.where == read.where
    assert "the line `model`" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('900 = "full"', '900 = "reuse"', "timestep 900, the first one, is to reuse (reuse), and nothing is computed"),
        ('600 = "reuse"', '600 = "skip"', "timestep 600 has the unknown mode 'skip'"),
        ('600 = "reuse"', "600 = 1", "timesteps.600: 1 is no mode"),
        ('600 = "reuse"', '600.5 = "reuse"', "timesteps.600: {'5': 'reuse'} is no mode"),
        ('600 = "reuse"', '950 = "reuse"', "timestep 950 comes after 900, but timesteps fall"),
        ('600 = "reuse"', '900 = "reuse"', "is not valid TOML"),
        ('600 = "reuse"', 'later = "reuse"', "'later' is no timestep"),
        ('600 = "reuse"', '-600 = "reuse"', "timestep -600"),
        ('600 = "reuse"\n', "", "says 3 steps, and lists 2 timesteps"),
        ("[timesteps]", "[timestep]", "unknown key 'timestep'"),
        ("scheduler", "sheduler", "unknown key 'sheduler'"),
        ("guidance = 1.5", 'guidance = "1.5"', "guidance: input should be a valid number"),
        ("steps = 3", "steps = 3.0", "steps: input should be a valid integer"),
        (WRITTEN, "", "timesteps: field required"),
        (WRITTEN, "[timesteps]", "0 timesteps"),
        (WRITTEN, '{"timesteps": {"900": "full"', "is not valid JSON"),
        (WRITTEN, "[1, 2", "is not valid TOML"),
    ],
)
def test_wrong_files(write: Callable[[str], Path], old: str, new: str, message: str) -> None:
    assert message in refused(write(WRITTEN.replace(old, new))).message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"variant": "reuse"', '"varient": "reuse"', "step 1 has the unknown key 'varient'"),
        ('"variant": "reuse"', '"variant": "half"', "a step runs 'half', which is no variant of steps"),
        ('"variant": "full"', '"variant": "reuse"', "the first one, is to reuse"),
        ('"timestep": 800.0', '"timestep": 950.0', "the timesteps of a plan must fall strictly"),
        ('"timestep": 800.0', '"timestep": "late"', "timestep: Input should be a valid number"),
        ('"fingerprint"', '"finger"', "fingerprint: Field required"),
        ('"format": 2', '"format": 1', "has format 1, not 2"),
        ('"plan"', '"plan" ', None),
        ('"steps": [', '"steps": [7, ', "steps"),
    ],
)
def test_wrong_plans_of_bundles(plan: StepPlan, tmp_path: Path, old: str, new: str, message: str | None) -> None:
    write_plan(tmp_path, SPEC, plan, {})
    path = tmp_path / "plan.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    if message is None:
        read_plan(path)
    else:
        assert message in refused(path).message


@pytest.mark.parametrize("content", ["[]", "{}", '{"plan": 3}', '{"plan": {"steps": 3}}'])
def test_other_json(write: Callable[[str], Path], content: str) -> None:
    refused(write(content))


def test_no_such_file(tmp_path: Path) -> None:
    assert "there is no such plan" in refused(tmp_path / "absent.toml").message
    assert "is not a bundle" in refused(tmp_path).message
    (tmp_path / "latin.toml").write_bytes(b"# \xe9t\xe9")
    assert "is not UTF-8 text" in refused(tmp_path / "latin.toml").message


def test_a_plan_without_a_cache_computes_every_step(write: Callable[[str], Path]) -> None:
    steps: Any = tuple(Step(timestep, UPDATE) for timestep in (2.0, 1.0))
    data = plan_data(StepPlan(Fingerprint("m", "ddim", 2, 1.0), steps))
    assert read_plan(write(plan_toml(data))).schedule.modes == (None, None)
