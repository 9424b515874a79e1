"""Cache schedules: which steps compute and which reuse cached values. NumPy only, no model.

`uniform`, `even` and `spread` space the computing steps evenly, `dps` is the schedule of CacheQuant, `plan` finds the
schedule of least measured error under a budget, and `climb` improves a schedule by its true error. A `TimedSchedule`
identifies its steps by their timestep values, and can be transferred to other steps.
"""

from qcgraph.plan.schedule.climbing import climb
from qcgraph.plan.schedule.planner import (
    CONDITIONAL,
    CacheSchedule,
    Mode,
    ReuseErrors,
    expected_error,
    least_share,
    plan,
)
from qcgraph.plan.schedule.spacing import dps, even, spread, uniform
from qcgraph.plan.schedule.timed import TimedSchedule

__all__ = [
    "CONDITIONAL",
    "CacheSchedule",
    "Mode",
    "ReuseErrors",
    "TimedSchedule",
    "climb",
    "dps",
    "even",
    "expected_error",
    "least_share",
    "plan",
    "spread",
    "uniform",
]
