"""The typed facts that passes leave for each other. Plain data, no torch.

A fact is a frozen dataclass of numbers, strings and tuples; a program holds at most one fact of a type. All facts
survive a JSON round trip exactly (see `encode` and `decode`).
"""

from qcgraph.facts.caching import NO_BLOCK, CachedValue, CachePlan, Rehearsed, SchedulePlan
from qcgraph.facts.calibration import CalibrationSet, Ranges, Reference, SiteRange
from qcgraph.facts.compensation import Compensation
from qcgraph.facts.equalization import Equalization, EqualizationPlan, EqualizedActivation
from qcgraph.facts.forecast import ForecastFit, ForecastStep
from qcgraph.facts.precision import ComputeType, Precision
from qcgraph.facts.quantization import (
    FLOAT8,
    LARGEST_FLOAT8,
    ActivationQuant,
    AttentionNodes,
    AttentionPlan,
    AttentionQuant,
    LinearNodes,
    QuantizedAttention,
    QuantizedLinear,
    QuantizedSites,
    QuantPlan,
    RegionQuant,
    Requantization,
    RoundedWeight,
    RoundedWeights,
    SiteCorrection,
    SiteQuant,
    TimestepGroups,
    WeightQuant,
    codes,
)
from qcgraph.facts.solver import TARGET_TITLES, SolverFit, SolverPlan, SolverTargets
from qcgraph.facts.store import FACT_TYPES, Fact, Facts, decode, encode, precision_of

__all__ = [
    "FACT_TYPES",
    "FLOAT8",
    "LARGEST_FLOAT8",
    "NO_BLOCK",
    "TARGET_TITLES",
    "ActivationQuant",
    "AttentionNodes",
    "AttentionPlan",
    "AttentionQuant",
    "CachePlan",
    "CachedValue",
    "CalibrationSet",
    "Compensation",
    "ComputeType",
    "Equalization",
    "EqualizationPlan",
    "EqualizedActivation",
    "Fact",
    "Facts",
    "ForecastFit",
    "ForecastStep",
    "LinearNodes",
    "Precision",
    "QuantPlan",
    "QuantizedAttention",
    "QuantizedLinear",
    "QuantizedSites",
    "Ranges",
    "Reference",
    "RegionQuant",
    "Rehearsed",
    "Requantization",
    "RoundedWeight",
    "RoundedWeights",
    "SchedulePlan",
    "SiteCorrection",
    "SiteQuant",
    "SiteRange",
    "SolverFit",
    "SolverPlan",
    "SolverTargets",
    "TimestepGroups",
    "WeightQuant",
    "codes",
    "decode",
    "encode",
    "precision_of",
]
