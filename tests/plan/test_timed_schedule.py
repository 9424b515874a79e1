"""Schedules by timestep values: their text, and what becomes of them at other steps."""

from __future__ import annotations

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.plan.schedule import TimedSchedule, even, uniform
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import NoiseSchedule

PLANNED = "980-20:FRRRRRFRRRRRRFRRRRRFRRRRFRRRFRRRFRRFRRFRRFRRFRFRFF"  # found for 50 steps of ddim


def timesteps(scheduler: str, steps: int) -> tuple[float, ...]:
    return make_step_plan(scheduler, steps, 1.0, NoiseSchedule(), "").timesteps


def letters(modes: tuple[str | None, ...]) -> str:
    words = {None: "F", "conditional": "C"}
    return "".join(words.get(mode) or str(mode).removeprefix("reuse").removeprefix("_") or "R" for mode in modes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:F", ((0.0,), "F")),
        ("980-20:FRR", ((980.0, 960.0, 940.0), "FRR")),
        ("980-20:FCR", ((980.0, 960.0, 940.0), "FCR")),
        ("999-50:FR+900-1:R2", ((999.0, 949.0, 900.0, 899.0), "FRR2")),
        ("999.5-0.25:F1", ((999.5, 999.25), "F1")),
        ("500-100:FR+7:F", ((500.0, 400.0, 7.0), "FRF")),
    ],
)
def test_text_round_trip(text: str, expected: tuple[tuple[float, ...], str]) -> None:
    schedule = TimedSchedule.parse(text)
    assert (schedule.timesteps, letters(schedule.modes)) == expected
    assert schedule.text == text


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 100])
def test_what_is_carried_over_survives_as_text(scheduler: str, steps: int) -> None:
    own = timesteps(scheduler, steps)
    schedule = TimedSchedule(own, TimedSchedule.parse(PLANNED).at(own))
    assert TimedSchedule.parse(schedule.text) == schedule


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++"])
@pytest.mark.parametrize("seed", range(20))
def test_at_its_own_steps_a_schedule_is_itself(scheduler: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    own = timesteps(scheduler, int(generator.integers(1, 60)))
    choices = (None, "reuse", "reuse_1")
    modes = (None, *(choices[index] for index in generator.integers(len(choices), size=len(own) - 1)))
    assert TimedSchedule(own, modes).at(own) == modes


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 20, 30, 49, 51, 100, 200])
def test_the_share_of_computing_steps_stays(scheduler: str, steps: int) -> None:
    modes = TimedSchedule.parse(PLANNED).at(timesteps(scheduler, steps))
    assert len(modes) == steps
    assert modes[0] is None
    assert modes.count(None) == max(1, int(14 * steps / 50 + 0.5))


@pytest.mark.parametrize("steps", [10, 25, 30, 100])
def test_computing_steps_stay_as_dense_at_each_time(steps: int) -> None:
    """As many of them, relative to all, lie above any timestep as before, to within a step or two."""
    own, other = TimedSchedule.parse(PLANNED), timesteps("ddim", steps)
    modes = own.at(other)
    for bound in range(0, 1000, 50):
        before = sum(mode is None for time, mode in zip(own.timesteps, own.modes, strict=True) if time >= bound)
        after = sum(mode is None for time, mode in zip(other, modes, strict=True) if time >= bound)
        assert abs(after - before * steps / 50) <= 1.5 + steps / 50


@pytest.mark.parametrize(
    ("own", "steps", "expected"),
    [
        ("900-100:FFFFFFFFFF", 4, "FFFF"),
        ("900-100:FRRRRRRRRR", 4, "FRRR"),
        ("900-100:FFFFFRRRRR", 4, "FFRR"),
        ("900-100:FRFRFRFRFR", 5, "FFRFR"),  # a half counts up; 800 is nearer to the first than to the second
        ("900-100:FRRRRFRRRR", 5, "FRRRR"),
        ("900-100:FRRRRFRRRR", 20, "FRRRRRFRRRRFRRRRFRRR"),  # the first of 20 lies before the first of 10
        ("900-100:FRR1111RRR", 20, "FRRRRRR1111F111RRRRR"),
    ],
)
def test_examples(own: str, steps: int, expected: str) -> None:
    assert letters(TimedSchedule.parse(own).at(timesteps("ddim", steps))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("FRR", "cannot read 'FRR'"),
        ("980:FRR", "cannot read '980:FRR'"),
        ("980-20:FXR", "cannot read '980-20:FXR'"),
        ("980-20:FR+", "cannot read ''"),
        ("980-20:RFR", "timestep 980, the first one, is to reuse"),
        ("980-20:FR+970:R", "timestep 970 comes after 960"),
        ("980-20:FR+960:R", "timestep 960 comes after 960"),
        ("10-20:FR", "timestep -10"),
        ("980-0:FR", "timestep 980 comes after 980"),
        ("9" * 400 + ":F", "timestep inf"),
        ("9" * 401 + ":F", "cannot read '999"),
        ("980-" + "9" * 400 + ":FR", "timestep "),
        ("\u0663\u0660-1:FR", "cannot read"),
        ("980-20:F" + "R" * 100_000, "a schedule of 100008 characters"),
    ],
)
def test_wrong_texts(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TimedSchedule.parse(text)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("own", "modes", "message"),
    [
        ((), (), "0 timesteps"),
        ((3.0, 2.0), (None,), "2 timesteps and 1 modes"),
        ((3.0, 2.0), (None, "skip"), "unknown mode 'skip'"),
        ((3.0, 2.0), (None, "reuse_10"), "unknown mode 'reuse_10'"),
        ((float("nan"), 2.0), (None, None), "timestep nan"),
        ((float("inf"), 2.0), (None, None), "timestep inf"),
    ],
)
def test_wrong_schedules(own: tuple[float, ...], modes: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        TimedSchedule(own, modes)
    assert caught.value.hint


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 51])
def test_even_has_the_asked_number_in_runs_of_about_one_length(steps: int) -> None:
    for computing in range(1, steps + 1):
        starts = np.flatnonzero(even(steps, computing))
        assert len(starts) == computing
        assert starts[0] == 0
        assert np.ptp(np.diff([*starts, steps])) <= 1
    for interval in range(1, steps + 1):
        if steps % interval == 0:
            assert even(steps, steps // interval) == uniform(steps, interval)


@pytest.mark.parametrize("computing", [0, 8])
def test_even_refuses(computing: int) -> None:
    with pytest.raises(UsageError, match="computing steps of 7"):
        even(7, computing)


def test_many_uneven_timesteps_are_written_in_a_moment() -> None:
    timesteps = tuple(float(value) for value in np.cumsum(np.arange(1, 20_001))[::-1])
    schedule = TimedSchedule(timesteps, (None, *["reuse"] * (len(timesteps) - 1)))
    assert schedule.text.count(":") == 10_000  # two timesteps are always evenly spaced
