"""Schedules: planners against enumeration of all schedules, budgets and fixed steps, and hill climbing."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from qcgraph.errors import UsageError
from qcgraph.plan.schedule import Mode, ReuseErrors, climb, dps, expected_error, plan, spread, uniform
from qcgraph.plan.schedule.search import Prices
from qcgraph.plan.schedule.spacing import group_costs

Array = npt.NDArray[np.float64]
Names = tuple[str | None, ...]  # per step, None where it computes, or a mode

ONE = (Mode("reuse", 0.1),)
TWO = (Mode("reuse", 0.1), Mode("half", 0.55))
THREE = (Mode("half", 0.37), Mode("reuse", 0.0), Mode("part", 0.2))


def feature_differences(steps: int, seed: int) -> Array:
    """L1 differences [T, T] of random walks, with garbage where nobody should look."""
    features = np.random.default_rng(seed).normal(size=(steps, 6)).cumsum(axis=0)
    differences = np.abs(features[:, None] - features[None]).sum(axis=-1)
    differences[np.tril_indices(steps)] = np.nan
    return differences


def reuse_errors(modes: int, steps: int, largest_gap: int, seed: int, unmeasured: float = 0.0) -> ReuseErrors:
    generator = np.random.default_rng(seed)
    values = generator.exponential(size=(modes, steps, largest_gap + 1, largest_gap + 1))
    values *= np.arange(modes, 0, -1)[:, None, None, None]
    values[generator.random(values.shape) < unmeasured] = np.inf
    return ReuseErrors(values)


def every_schedule(steps: int, modes: tuple[Mode, ...]) -> Iterator[Names]:
    names: list[str | None] = [None, *(mode.name for mode in modes)]
    for rest in itertools.product(names, repeat=steps - 1):
        yield (None, *rest)


def cost_of(names: Names, modes: tuple[Mode, ...]) -> float:
    costs: dict[str | None, float] = {None: 1.0} | {mode.name: mode.cost for mode in modes}
    return sum(costs[name] for name in names)


def written_out(names: Names, errors: ReuseErrors, modes: tuple[Mode, ...]) -> float:
    """The error of a schedule by its definition."""
    index = {mode.name: position for position, mode in enumerate(modes)}
    room = errors.values.shape[2]
    total = 0.0
    for step, name in enumerate(names):
        if name is None:
            continue
        computing = [place for place in range(step) if names[place] is None]
        gap = step - computing[-1]
        earlier = computing[-1] - computing[-2] if len(computing) > 1 else 0
        measured = gap < room and earlier < room
        total += errors.values[index[name], step, gap, earlier] if measured else np.inf
    return total


def letters(schedule: list[bool]) -> str:
    return "".join("F" if computes else "R" for computes in schedule)


@pytest.mark.parametrize(("interval", "expected"), [(1, "FFFFFFF"), (2, "FRFRFRF"), (3, "FRRFRRF"), (9, "FRRRRRR")])
def test_uniform(interval: int, expected: str) -> None:
    assert letters(uniform(7, interval)) == expected


@pytest.mark.parametrize(
    ("computing", "expected"),
    [
        (1, "FRRRRRRRR"),
        (2, "FRRRFRRRR"),
        (3, "FFRRRFRRR"),
        (4, "FFRFRRFRR"),
        (5, "FFRFRFRFR"),
        (8, "FFFFFFFFR"),
        (9, "FFFFFFFFF"),
    ],
)
def test_spread(computing: int, expected: str) -> None:
    assert letters(spread(9, computing)) == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 51])
def test_spread_has_the_asked_number_in_even_runs(steps: int) -> None:
    for computing in range(1, steps + 1):
        starts = np.flatnonzero(spread(steps, computing))
        assert len(starts) == computing
        assert starts[0] == 0
        assert computing < 3 or starts[1] == 1
        lengths = np.diff([*starts[1 if computing >= 3 else 0 :], steps])
        assert np.ptp(lengths) <= 1


def is_allowed(cuts: tuple[int, ...], interval: int, window: bool) -> bool:
    lengths = np.diff(cuts)
    return not window or bool(((lengths >= math.ceil(interval / 2)) & (lengths <= 2 * interval)).all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("steps", "interval"), [(1, 1), (7, 2), (9, 3), (10, 3), (11, 4), (12, 5), (13, 4), (6, 6)])
@pytest.mark.parametrize("window", [True, False])
def test_dps_is_the_best_of_all_groupings(steps: int, interval: int, seed: int, window: bool) -> None:
    differences = feature_differences(steps, seed)

    def objective(cuts: tuple[int, ...]) -> float:
        return sum(differences[i, t] for i, j in itertools.pairwise(cuts) for t in range(i + 1, j))

    inner = itertools.combinations(range(1, steps), math.ceil(steps / interval) - 1)
    groupings = [cuts for cuts in ((0, *rest, steps) for rest in inner) if is_allowed(cuts, interval, window)]
    found = (*(int(start) for start in np.flatnonzero(dps(differences, interval, window=window))), steps)
    assert found in groupings
    assert objective(found) == pytest.approx(min(map(objective, groupings)), rel=1e-12)


def test_dps_without_skips_computes_every_step() -> None:
    assert all(dps(feature_differences(9, 0), 1, window=False))
    assert all(dps(feature_differences(9, 0), 1))


def test_the_window_can_be_kept_unless_one_group_is_too_long() -> None:
    for steps, interval in itertools.product(range(1, 25), range(1, 40)):
        differences = feature_differences(steps, seed=0)
        if steps >= math.ceil(interval / 2):
            cuts = (*np.flatnonzero(dps(differences, interval)), steps)
            assert len(cuts) - 1 == math.ceil(steps / interval)
            assert is_allowed(cuts, interval, window=True)
        else:
            with pytest.raises(UsageError, match="too few"):
                dps(differences, interval)


def test_group_costs_are_the_sums_written_out() -> None:
    differences = feature_differences(30, seed=1)
    costs = group_costs(differences, None)
    for i, j in itertools.product(range(30), range(31)):
        expected = sum(differences[i, i + 1 : j]) if j > i else np.inf
        assert costs[i, j] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("modes", [ONE, (Mode("reuse", 0.0),)], ids=["tenth", "free"])
@pytest.mark.parametrize("unmeasured", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_plan_is_the_best_of_all_schedules(modes: tuple[Mode, ...], seed: int, unmeasured: float) -> None:
    errors = reuse_errors(1, 9, 4, seed, unmeasured)
    candidates = [(cost_of(names, modes), written_out(names, errors, modes)) for names in every_schedule(9, modes)]
    floor = min(cost for cost, error in candidates if math.isfinite(error))
    for budget in [floor, *np.linspace(floor, 9, 11)]:
        expected = min(error for cost, error in candidates if cost <= budget + 1e-9)
        found = plan(errors, modes, 9, budget)
        assert found.error == pytest.approx(expected, rel=1e-12)
        assert found.error == pytest.approx(written_out(found.modes, errors, modes), rel=1e-12)
        assert found.cost == pytest.approx(cost_of(found.modes, modes), rel=1e-12)
        assert found.cost <= budget + 1e-9


@pytest.mark.parametrize("unmeasured", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_plan_of_two_modes_is_the_best_of_all_schedules(seed: int, unmeasured: float) -> None:
    """Their costs are whole ticks: reuse 0, half 1 and full 2."""
    errors = reuse_errors(2, 8, 3, seed, unmeasured)
    candidates = [(cost_of(names, TWO), written_out(names, errors, TWO)) for names in every_schedule(8, TWO)]
    floor = min(cost for cost, error in candidates if math.isfinite(error))
    for budget in np.linspace(floor, 8, 9):
        expected = min(error for cost, error in candidates if cost <= budget + 1e-9)
        found = plan(errors, TWO, 8, budget)
        assert found.error == pytest.approx(expected, rel=1e-12)
        assert found.cost <= budget + 1e-9


@pytest.mark.parametrize("modes", [THREE, (Mode("reuse", 0.0123), Mode("half", 0.5432))], ids=["three", "odd"])
@pytest.mark.parametrize("seed", range(3))
def test_plan_of_odd_costs_is_the_best_but_for_rounding(modes: tuple[Mode, ...], seed: int) -> None:
    """A mode counts for at most 1/32 of a computing step more than it costs."""
    errors = reuse_errors(len(modes), 6, 5, seed, unmeasured=0.1)
    candidates = [(cost_of(names, modes), written_out(names, errors, modes)) for names in every_schedule(6, modes)]
    for budget in np.linspace(3, 6, 9):
        found = plan(errors, modes, 6, budget)
        best, sure = (
            min(error for cost, error in candidates if cost <= limit + 1e-9) for limit in (budget, budget - 5 / 32)
        )
        assert best * (1 - 1e-12) <= found.error <= sure * (1 + 1e-12)
        assert found.cost <= budget + 1e-9


@pytest.mark.parametrize("count", [1, 2, 3])
def test_costs_are_rounded_up_and_by_little(count: int) -> None:
    for costs in np.random.default_rng(count).random((50, count)):
        prices = Prices.of(list(costs))
        counted = costs.min() + np.array(prices.skips) / prices.full * (1 - costs.min())
        assert (counted >= costs - 1e-9).all()
        assert (counted <= costs + 1 / 32).all()


def test_modes_of_equal_cost_are_planned_exactly() -> None:
    modes = (Mode("first", 0.3), Mode("second", 0.3))
    errors = reuse_errors(2, 7, 3, seed=5)
    candidates = [(cost_of(names, modes), written_out(names, errors, modes)) for names in every_schedule(7, modes)]
    for budget in np.linspace(4.2, 7, 9):
        expected = min(error for cost, error in candidates if cost <= budget + 1e-9)
        assert plan(errors, modes, 7, budget).error == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("modes", [ONE, TWO, THREE], ids=["one", "two", "three"])
def test_the_whole_budget_computes_every_step(modes: tuple[Mode, ...]) -> None:
    for budget in (20, 1000):
        found = plan(reuse_errors(len(modes), 20, 6, seed=0), modes, 20, budget)
        assert found.modes == (None,) * 20
        assert (found.error, found.cost) == (0, 20)


def test_equal_errors_are_reached_at_the_least_cost() -> None:
    errors = ReuseErrors(np.zeros((2, 10, 4, 4)))
    found = plan(errors, TWO, 10, 9)
    assert found.modes.count(None) == 3  # a computing step serves the 3 steps that follow it
    assert "half" not in found.modes


@pytest.mark.parametrize("modes", [ONE, THREE], ids=["one", "three"])
@pytest.mark.parametrize("unmeasured", [0.0, 0.4])
def test_an_unreachable_budget_names_the_least_one(modes: tuple[Mode, ...], unmeasured: float) -> None:
    errors = reuse_errors(len(modes), 23, 5, seed=2, unmeasured=unmeasured)
    with pytest.raises(UsageError, match=r"no schedule costs at most 0\.01 of computing every step") as caught:
        plan(errors, modes, 23, 0.01 * 23)
    stated = re.search(r"least reachable budget is ([\d.]+);", str(caught.value.hint))
    assert stated is not None
    least = float(stated.group(1)) * 23
    assert math.isfinite(plan(errors, modes, 23, least).error)
    with pytest.raises(UsageError, match="no schedule costs"):
        plan(errors, modes, 23, least - 0.005)


def test_the_least_budget_is_the_one_of_gaps_that_were_measured() -> None:
    with pytest.raises(UsageError) as caught:
        plan(reuse_errors(1, 12, 2, seed=0), ONE, 12, 1)
    # FRR F FRR F FRR F, say: a run of 3 steps is followed by one without skips, for earlier = 3 has no error.
    assert "0.5500" in str(caught.value.hint)  # or runs of 2 steps: 6 computing steps of 12


@pytest.mark.parametrize("modes", [ONE, TWO], ids=["one", "two"])
def test_fixed_steps_compute(modes: tuple[Mode, ...]) -> None:
    errors = reuse_errors(len(modes), 16, 6, seed=3)
    free = plan(errors, modes, 16, 8)
    fixed = {1, 2, 11, *(step for step in range(16) if free.modes[step] is not None and step % 5 == 0)}
    found = plan(errors, modes, 16, 9, fixed=fixed)
    assert {found.modes[step] for step in fixed} == {None}
    assert found.modes[0] is None
    assert plan(errors, modes, 16, 8, fixed=fixed).error >= free.error


def test_fixed_steps_leave_the_best_of_the_rest() -> None:
    errors = reuse_errors(1, 9, 4, seed=7)
    allowed = [names for names in every_schedule(9, ONE) if names[4] is names[5] is None and cost_of(names, ONE) <= 4.6]
    expected = min(written_out(names, errors, ONE) for names in allowed)
    assert plan(errors, ONE, 9, 4.6, fixed=(4, 5)).error == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("modes", [ONE, TWO, THREE], ids=["one", "two", "three"])
def test_a_larger_budget_is_never_worse(modes: tuple[Mode, ...]) -> None:
    errors = reuse_errors(len(modes), 30, 8, seed=4)
    found = [plan(errors, modes, 30, budget) for budget in np.linspace(9, 30, 40)]
    assert all(later.error <= before.error for before, later in itertools.pairwise(found))
    assert all(schedule.cost <= budget + 1e-9 for schedule, budget in zip(found, np.linspace(9, 30, 40), strict=True))


@pytest.mark.slow
def test_budgets_are_met_to_the_last_step() -> None:
    """Costs that binary fractions cannot hold do not lose a computing step."""
    errors = reuse_errors(1, 50, 49, seed=6)
    for cost, computing in itertools.product((0.1, 0.3, 1 / 3, 0.7), range(4, 50)):
        budget = sum([1.0] * computing + [cost] * (50 - computing))
        assert plan(errors, (Mode("reuse", cost),), 50, budget).modes.count(None) == computing


def test_a_schedule_from_elsewhere_is_priced() -> None:
    errors = reuse_errors(1, 12, 3, seed=8)
    names = tuple(None if computes else "reuse" for computes in uniform(12, 3))
    assert expected_error(names, errors, ONE) == pytest.approx(written_out(names, errors, ONE), rel=1e-12)
    unmeasured_gap = (None, *["reuse"] * 4, *[None] * 7)
    unmeasured_earlier = (None, *["reuse"] * 3, None, "reuse", *[None] * 6)
    assert expected_error(unmeasured_gap, errors, ONE) == math.inf
    assert expected_error(unmeasured_earlier, errors, ONE) == math.inf
    assert plan(errors, ONE, 12, cost_of(names, ONE)).error <= expected_error(names, errors, ONE)


def test_one_step() -> None:
    assert uniform(1, 3) == spread(1, 1) == dps(np.zeros((1, 1)), 2) == [True]
    assert plan(reuse_errors(1, 1, 3, seed=0), ONE, 1, 1).modes == (None,)


TARGET = (None, None, "reuse", "reuse", None, "half", "reuse", None, "reuse", "reuse", "half", "reuse")
START = (None, None, None, None, "half", "half", *["reuse"] * 6)


def distance(names: Names) -> float:
    return sum(own != other for own, other in zip(names, TARGET, strict=True))


def recorded(evaluate: Callable[[Names], float]) -> tuple[list[Names], Callable[..., float]]:
    calls: list[Names] = []

    def record(names: Names) -> float:
        calls.append(names)
        return evaluate(names)

    return calls, record


def rugged(names: Names) -> float:
    return float(np.random.default_rng([len(name or "full") * index for index, name in enumerate(names)]).random())


@pytest.mark.parametrize("evaluate", [distance, rugged])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rounds", [1, 2, 30])
def test_climbing_keeps_its_promises(evaluate: Callable[..., float], seed: int, rounds: int) -> None:
    calls, record = recorded(evaluate)
    best, error = climb(START, record, rounds=rounds, seed=seed, fixed=(0, 1))
    assert calls[0] == START
    assert len(calls) == len(set(calls)) == rounds
    assert error == evaluate(best) == min(map(evaluate, calls)) <= evaluate(START)
    assert all(Counter(names) == Counter(START) for names in calls)  # so the cost stays
    assert all(names[:2] == (None, None) for names in calls)
    again, record = recorded(evaluate)
    assert climb(START, record, rounds=rounds, seed=seed, fixed=(0, 1)) == (best, error)
    assert again == calls


def test_climbing_arrives_and_stops() -> None:
    calls, record = recorded(distance)
    assert climb(START, record, rounds=10_000, seed=0) == (TARGET, 0)
    assert len(calls) < 1000


def test_climbing_depends_on_the_seed() -> None:
    first, record = recorded(distance)
    climb(START, record, rounds=10, seed=0)
    second, record = recorded(distance)
    climb(START, record, rounds=10, seed=1)
    assert first != second


def test_climbing_shifts_computing_steps_first() -> None:
    calls, record = recorded(lambda names: 1.0)
    start = (None, "reuse", "reuse", None, "reuse", "reuse", "reuse")
    climb(start, record, rounds=100, seed=0)
    places = [abs(names.index(None, 1) - 3) for names in calls[1:]]
    assert places == [1, 1, 2, 2, 3]  # every place but the first step's


def test_climbing_ends_without_neighbours() -> None:
    calls, record = recorded(distance)
    start = (None,) * 12
    assert climb(start, record, rounds=10, seed=0) == (start, distance(start))
    assert calls == [start]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform(0, 1), "a schedule of 0 steps"),
        (lambda: uniform(4, 0), "interval 0"),
        (lambda: spread(4, 5), "5 computing steps of 4"),
        (lambda: spread(4, 0), "0 computing steps of 4"),
        (lambda: dps(np.zeros((3, 4)), 2), "feature differences of the shape"),
        (lambda: dps(np.zeros((0, 0)), 2), "feature differences of the shape"),
        (lambda: dps(np.full((3, 3), np.nan), 2), "a feature difference is not finite"),
        (lambda: dps(np.zeros((2, 2)), 5), "2 steps are too few for groups of 3 to 10"),
        (lambda: Mode("reuse", 1.0), "mode 'reuse' costs 1 of a computing step"),
        (lambda: Mode("reuse", math.nan), "mode 'reuse' costs nan"),
        (lambda: ReuseErrors(np.zeros((1, 4, 3, 2))), "skip errors of the shape"),
        (lambda: ReuseErrors(np.zeros((0, 4, 3, 3))), "skip errors of the shape"),
        (lambda: ReuseErrors(np.full((1, 4, 3, 3), np.nan)), "a skip error is negative or not a number"),
        (lambda: ReuseErrors(np.full((1, 4, 3, 3), -1.0)), "a skip error is negative or not a number"),
        (lambda: plan(reuse_errors(1, 4, 2, 0), TWO, 4, 4), "skip errors of 1 modes and 4 steps"),
        (lambda: plan(reuse_errors(1, 4, 2, 0), ONE, 5, 4), "skip errors of 1 modes and 4 steps"),
        (lambda: plan(reuse_errors(2, 4, 2, 0), ONE * 2, 4, 4), "two modes share a name"),
        (lambda: plan(reuse_errors(1, 4, 2, 0), ONE, 4, 4, fixed=(0, 4)), "step 4 is to compute"),
        (lambda: expected_error((None,) * 3, reuse_errors(1, 4, 2, 0), ONE), "a schedule of 3 steps"),
        (lambda: expected_error(("reuse",) * 4, reuse_errors(1, 4, 2, 0), ONE), "the first reuse"),
        (lambda: expected_error((None, "resue"), reuse_errors(1, 2, 1, 0), ONE), "unknown mode 'resue'"),
        (lambda: climb(START, distance, rounds=0, seed=0), "0 rounds"),
        (lambda: climb(START, lambda names: math.nan, rounds=3, seed=0), "is not a number"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        call()
    assert caught.value.hint
