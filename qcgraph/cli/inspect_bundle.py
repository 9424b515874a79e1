"""Show views of a bundle, without torch: every view is data first, and a table made of this data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from qcgraph.bundle import Bundle
from qcgraph.bundle.plan_file import plan_data, plan_toml
from qcgraph.bundle.report import CacheReport, SolverReport
from qcgraph.cli.cache_view import cache_fields
from qcgraph.cli.ir_text import op_changes, ops_text, read_program_text
from qcgraph.cli.output import count_text, print_fields, print_heading, print_json, print_table, size_text
from qcgraph.cli.program_view import pass_text
from qcgraph.cli.scales_view import print_scales, scales
from qcgraph.cli.solver_view import print_solver, solver, solver_text
from qcgraph.compiler.cache_report import cache_report
from qcgraph.compiler.solver_report import solver_report
from qcgraph.facts import AttentionPlan, ForecastFit, QuantPlan

MOST_OPS = 5  # operations that the overview names


def inspect_bundle(bundle: Bundle, show: str | None, *, json: bool) -> None:
    """Print the overview, or one of the views."""
    data, print_data = VIEWS[show or "overview"]
    value = data(bundle)
    if json:
        print_json(value)
    else:
        print_data(value)


def _overview(bundle: Bundle) -> dict[str, Any]:
    spec, plan, manifest = bundle.spec, bundle.plan, bundle.manifest
    program = read_program_text(pass_text(bundle, None).text)
    quantized, cache, fitted = bundle.facts.get(QuantPlan), cache_report(bundle.facts), solver_report(bundle.facts)
    return {
        "bundle": str(bundle.path),
        "qcgraph": manifest.qcgraph,
        "packages": manifest.packages,
        "bytes": bundle.size,
        "model": {
            "name": spec.name,
            "latent_shape": list(spec.latent_shape),
            "conditions": spec.conditions_text,
            "prediction": spec.noise_schedule.prediction,
            "description": spec.describe(),
        },
        "target": manifest.target,
        "plan": plan.describe(),
        "schedule": plan.schedule(),
        "solver": fitted.model_dump(mode="json") if fitted else None,
        "cache": cache.model_dump(mode="json") if cache else None,
        "timestep_groups": plan.group_count,
        "quantized_sites": len(quantized.sites) if quantized else 0,
        "graphs": {
            name: {
                "steps": plan.uses(name),
                "inputs": [f"{item.name}: {item}" for item in interface.inputs],
                "outputs": [f"{item.name}: {item}" for item in interface.outputs],
                "ops": dict(program.graphs[name].ops.most_common()) if name in program.graphs else {},
            }
            for name, interface in bundle.interfaces.items()
        },
        "passes": _passes(bundle),
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
    }


def _passes(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the changes of every pass, from the texts of the program before and after it."""
    programs = [(text, read_program_text(text.text)) for text in bundle.ir_texts]
    history = dict(enumerate(bundle.history, start=1))
    rows = []
    for (_, before), (text, after) in pairwise(programs):
        record = history.get(text.index, {})
        rows.append(
            {
                "index": text.index,
                "text": record.get("text", text.name),
                "changed": record.get("changed"),
                "refused": refused_count(record.get("refusals", ())),
                "graphs": {
                    name: {"added": dict(added), "removed": dict(removed)}
                    for name, (added, removed) in op_changes(before, after).items()
                },
            }
        )
    return rows


def refused_count(refusals: Iterable[Mapping[str, str]]) -> int:
    """Return the number of distinct refusals; every graph with the same node repeats its refusal."""
    return len({(refusal["where"], refusal["reason"]) for refusal in refusals})


def _print_overview(data: Mapping[str, Any]) -> None:
    print_fields(
        [
            ("bundle", f"{data['bundle']}, {size_text(data['bytes'])}, written by qcgraph {data['qcgraph']}"),
            ("model", data["model"]["description"]),
            ("target", data["target"]),
            ("sampling", data["plan"]),
            *([("solver", solver_text(SolverReport.model_validate(data["solver"])))] if data["solver"] else []),
            ("schedule", data["schedule"]),
            *cache_fields(data["cache"] and CacheReport.model_validate(data["cache"])),
            ("quantized", count_text(data["quantized_sites"], "linear layer")),
            ("scales", count_text(data["timestep_groups"], "timestep group")),
        ]
    )
    print_heading("graphs")
    print_table(
        ("graph", "steps", "nodes", "inputs", "outputs", "most frequent"),
        [
            (
                name,
                graph["steps"],
                sum(graph["ops"].values()),
                ", ".join(item.partition(":")[0] for item in graph["inputs"]),
                ", ".join(item.partition(":")[0] for item in graph["outputs"]),
                ops_text(Counter(graph["ops"]), most=MOST_OPS),
            )
            for name, graph in data["graphs"].items()
        ],
        right=("steps", "nodes"),
    )
    print_heading("passes")
    print_table(
        ("", "pass", "refused", "what it changed"),
        [(f"{row['index']:03d}", row["text"], row["refused"] or "-", _change_text(row)) for row in data["passes"]],
        right=("refused",),
    )
    print_heading("files")
    print_table(
        ("file", "size"),
        [(name, size_text(count)) for name, count in data["files"].items() if not name.startswith("ir/")],
        right=("size",),
    )
    print("\nmore: --show schedule|solver|plan|scales|refused|sites|pipeline, --after PASS, --node GLOB")


def _change_text(row: Mapping[str, Any]) -> str:
    if row["changed"] is False:
        return "nothing"
    parts = []
    for name, change in row["graphs"].items():
        added, removed = sum(change["added"].values()), sum(change["removed"].values())
        parts.append(f"{name} +{added} -{removed} nodes")
    return ", ".join(parts) or "facts only"


def _schedule(bundle: Bundle) -> list[dict[str, Any]]:
    forecasts = _forecast_errors(bundle)
    return [
        {
            "step": index,
            "timestep": step.timestep,
            "variant": step.variant,
            "group": step.group,
            "row": step.row,
            "latent": step.update.latent,
            "noise_prediction": step.update.noise_prediction,
            "noise": step.update.noise,
            "history": [asdict(term) for term in step.update.history],
            "forecast_errors": forecasts.get(index, {}),
        }
        for index, step in enumerate(bundle.plan.steps)
    ]


def _forecast_errors(bundle: Bundle) -> dict[int, dict[str, float]]:
    """Return the relative error of every forecast, by step and cached value."""
    fit, found = bundle.facts.get(ForecastFit), dict[int, dict[str, float]]()
    for entry in fit.steps if fit else ():
        found.setdefault(entry.step, {})[entry.name] = entry.forecast
    return found


def _print_schedule(rows: list[dict[str, Any]]) -> None:
    depth = max(len(row["history"]) for row in rows)
    earlier = [f"+ {term}, {back} back" for back in range(1, depth + 1) for term in ("x", "eps")]
    forecast = ["forecast off by"] if any(row["forecast_errors"] for row in rows) else []
    print_table(
        ("step", "timestep", "graph", *forecast, "group", "x' = c1 x", "+ c2 eps", "+ c3 z", *earlier),
        [
            (
                row["step"],
                f"{row['timestep']:g}",
                row["variant"],
                *([_worst(row["forecast_errors"])] if forecast else []),
                row["group"],
                f"{row['latent']:.6f}",
                f"{row['noise_prediction']:.6f}",
                f"{row['noise']:.6f}",
                *_history_texts(row["history"], depth),
            )
            for row in rows
        ],
        right=("step", "timestep", *forecast, "group", "x' = c1 x", "+ c2 eps", "+ c3 z", *earlier),
    )


def _worst(errors: Mapping[str, float]) -> str:
    return f"{max(errors.values()):.1%}" if errors else ""


def _history_texts(history: Sequence[Mapping[str, float]], depth: int) -> Iterator[str]:
    """Yield two cells for every earlier step, empty cells where the update does not look back that far."""
    for term in history:
        yield from (f"{term[key]:.6f}" for key in ("latent", "noise_prediction"))
    yield from [""] * (2 * (depth - len(history)))


def _plan(bundle: Bundle) -> dict[str, Any]:
    return plan_data(bundle.plan)


def _print_plan(data: dict[str, Any]) -> None:
    print(plan_toml(data), end="")


def _refused(bundle: Bundle) -> list[dict[str, str]]:
    return [
        {"pass": record["text"].partition("{")[0], "where": refusal["where"], "reason": refusal["reason"]}
        for record in bundle.history
        for refusal in record["refusals"]
    ]


def _print_refused(rows: list[dict[str, str]]) -> None:
    if not rows:
        print("no pass refused anything")
        return
    unique = dict.fromkeys((row["pass"], row["where"], row["reason"]) for row in rows)
    print_table(("pass", "left alone", "because"), unique)


def _sites(bundle: Bundle) -> list[dict[str, Any]]:
    """Return quantized sites, then sites left in floating point with the reason of `plan-quant`."""
    linears, attentions = bundle.facts.get(QuantPlan), bundle.facts.get(AttentionPlan)
    names = [*(linears.sites if linears else ()), *(attentions.sites if attentions else ())]
    quantized = [{"site": name, "quantized": True, "reason": ""} for name in names]
    refused = {row["where"]: row["reason"] for row in _refused(bundle) if row["pass"] == "plan-quant"}
    return quantized + [
        {"site": name, "quantized": False, "reason": reason} for name, reason in refused.items() if name not in names
    ]


def _print_sites(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("nothing is quantized")
        return
    print_table(
        ("site", "arithmetic", "because"),
        [(row["site"], "integer" if row["quantized"] else "float", row["reason"]) for row in rows],
    )


def _pipeline(bundle: Bundle) -> list[dict[str, Any]]:
    return [{"text": record["text"], "changed": record["changed"]} for record in bundle.history]


def _print_pipeline(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(row["text"] if row["changed"] else f"{row['text']}   (changed nothing)")


VIEWS: dict[str, tuple[Callable[[Bundle], Any], Callable[[Any], None]]] = {
    "overview": (_overview, _print_overview),
    "schedule": (_schedule, _print_schedule),
    "solver": (solver, print_solver),
    "plan": (_plan, _print_plan),
    "scales": (scales, print_scales),
    "refused": (_refused, _print_refused),
    "sites": (_sites, _print_sites),
    "pipeline": (_pipeline, _print_pipeline),
}
