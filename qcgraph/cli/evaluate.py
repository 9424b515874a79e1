"""qcgraph eval: quality against full precision, with error attribution."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcgraph.cli.output import (
    MOST_SAMPLES,
    MOST_THREADS,
    JsonOption,
    count_text,
    finite,
    print_heading,
    print_json,
    print_table,
)
from qcgraph.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from qcgraph.bundle import Bundle
    from qcgraph.evaluation.bootstrap import BootstrapEstimate
    from qcgraph.evaluation.evaluate import Evaluation
    from qcgraph.evaluation.rows import EvaluatedSetting
    from qcgraph.files.atomic import FolderKind

KIND = "eval"
FILES = ("eval.json", "samples.png", "curves.png")
NOTHING = "-"
WORST_SITES = 8  # the worst sites that are printed; the JSON contains all sites
MOMENTS = 5  # the number of steps whose latent errors are printed; the JSON contains all steps


def eval_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that qcgraph compile wrote.")],
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="16 samples of one seed, psnr and ssim, and only what decides: the parts, the bundle, and what costs "
            "as much. Other options win over it.",
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", max=MOST_SAMPLES, help="Samples of each seed; by default 128, of large models fewer."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", max=MOST_SAMPLES, help="How many seeds; by default 3.")
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="S", max=2**31, help="Which seeds: another number shares no noise with this one.")
    ] = 0,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="From psnr, ssim, latent_error, fid_small, kid, accuracy; by default all."),
    ] = None,
    gate: Annotated[
        str | None, typer.Option(metavar="TERMS", help='Conditions, such as "psnr>=28,accuracy_drop<=0.01".')
    ] = None,
    attribution: Annotated[
        bool | None,
        typer.Option("--attribution/--no-attribution", help="Measure the parts alone and what costs as much, too."),
    ] = None,
    sites: Annotated[
        bool | None,
        typer.Option("--sites/--no-sites", help="Measure every quantized layer, too; only with attribution."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where the model is, if it is not where it was compiled from.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help=f"The folder to write: {', '.join(FILES)}.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", max=MOST_THREADS, help="How many threads; by default all cores.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure the loss of quality by a bundle and by its parts.

    Samples of the bundle, of its parts alone, and of alternatives at equal cost are compared with full precision from
    the same noise. Intervals show where another run with other seeds is expected. Exits with 1 when the bundle is at
    fault, or the gate is not met.
    """
    from qcgraph.bundle import Bundle
    from qcgraph.bundle.watch import reading
    from qcgraph.recipe.gate import Gate

    if sites and attribution is False:
        raise UsageError("--sites needs the parts that --no-attribution leaves out", hint="leave one of the two out")
    conditions = Gate.parse(gate) if gate is not None else None
    opened = Bundle.open(bundle)
    from qcgraph.evaluation.evaluate import QUICK, Options, evaluate
    from qcgraph.evaluation.settings import Subject
    from qcgraph.progress import progress_for

    names = tuple(name.strip() for name in metrics.split(",")) if metrics is not None else None
    asked: dict[str, Any] = {
        "samples": samples,
        "seeds": seeds,
        "metrics": names,
        "attribution": attribution,
        "sites": sites,
        "gate": conditions,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    options = replace(QUICK if quick else Options(), seed=seed, **given)
    if output is not None:
        _check_output(output)
    with reading(opened, done="evaluated"):
        subject = Subject.of_bundle(opened, model, threads)
        evaluation = evaluate(subject, options, progress_for(sys.stderr))
    document = _document(evaluation, opened, bundle, threads)
    if output is not None:
        _write(evaluation, opened, output, document)
    if json:
        print_json(document)
    else:
        _print(evaluation, opened)
        if output is not None:
            print(f"\nwritten: {', '.join(str(output / name) for name in FILES)}")
    _check(evaluation, bundle)


def _document(evaluation: Evaluation, bundle: Bundle, path: Path, threads: int | None) -> dict[str, Any]:
    return {
        "kind": KIND,
        "format": 1,
        "bundle": str(path),
        "model": bundle.spec.name,
        "target": bundle.manifest.target,
        "recipe": bundle.recipe.model_dump(),
        "plan": bundle.plan.describe(),
        "schedule": bundle.plan.schedule(),
        "threads": threads,
        **evaluation.to_json(),
    }


def _check(evaluation: Evaluation, bundle: Path) -> None:
    """Raise an error if the bundle is at fault or the gate is not met."""
    from qcgraph.recipe.gate import require

    if evaluation.faults:
        fault = evaluation.faults[0]
        more = f", and {len(evaluation.faults) - 1} more" if len(evaluation.faults) > 1 else ""
        raise VerificationError(
            f"{fault.kind} at fault, {fault.where}: {fault.message}{more}",
            where=str(bundle),
            hint="compile it again, and check it with qcgraph verify; report it if that does not help",
        )
    hint = "the table shows which part costs how much: more bits, a shorter interval, or a wider gate"
    require(evaluation.verdicts, where=str(bundle), hint=hint)


def _check_output(folder: Path) -> None:
    from qcgraph.evaluation.pictures import check_drawing
    from qcgraph.files.atomic import check_file

    check_drawing()
    if not folder.is_dir():
        check_file(folder)
    _output_kind().check(folder, force=True)


def _output_kind() -> FolderKind:
    """Return the kind of folder that this command writes, and that may replace an earlier one."""
    from qcgraph.files.atomic import FolderKind, Written
    from qcgraph.files.folder import record_of

    def written(folder: Path) -> Written | None:
        is_ours = record_of(folder, FILES[0]).get("kind") == KIND
        return dict.fromkeys(FILES) if is_ours else None

    return FolderKind(written, "exists and is not what qcgraph eval wrote")


def _write(evaluation: Evaluation, bundle: Bundle, folder: Path, document: dict[str, Any]) -> None:
    from qcgraph.evaluation.pictures import draw_curves, save_samples

    curves = draw_curves(evaluation, bundle.plan)  # drawing takes a second, during which the folder need not be locked
    with _output_kind().writing(folder, force=True) as partial:
        save_samples(evaluation, partial / FILES[1], is_image=bundle.spec.is_image)
        (partial / FILES[2]).write_bytes(curves)
        (partial / FILES[0]).write_text(json_format.dumps(finite(document), indent=2) + "\n", "utf-8")


def _print(evaluation: Evaluation, bundle: Bundle) -> None:
    seeds = count_text(len(evaluation.seeds), "seed")
    print(f"{bundle.spec.name}, {bundle.plan.describe()}: {count_text(evaluation.samples, 'sample')} of {seeds} each")
    if any(row.converged_psnr is not None or row.psnr_spread is not None for row in evaluation.rows):
        print_heading("distance, PSNR in dB: of the mean error, the median sample, and the worst tenth")
        _print_distances(evaluation)
    print_heading("settings (in brackets: where another run with other seeds is expected)")
    _print_rows(evaluation)
    if evaluation.floors:
        floor = ", ".join(f"{name} {value:.3g}" for name, value in evaluation.floors.items())
        print(f"\nreal images among themselves, as many as samples of a seed: {floor}")
    if evaluation.converged_floor is not None:
        count = count_text(evaluation.converged_samples, "sample")
        print(
            f"the converged reference, of {count} of the first seed, agrees with half its steps to "
            f"{evaluation.converged_floor:.1f} dB"
        )
    if len(evaluation.rows) > 2:  # more rows than full precision and the bundle
        _print_attribution(evaluation)
    _print_problems(evaluation)


def _print_distances(evaluation: Evaluation) -> None:
    """Print how far the samples of every setting are from the converged run, and from full precision."""
    columns = ("setting", "steps of work", "to converged", "median", "worst", "to full precision", "median", "worst")
    rows = [
        (
            row.title,
            f"{row.cost:.1f}",
            *_decibel_cells(row.converged_psnr, row.converged_spread),
            *_decibel_cells(row.metrics["psnr"].value if "psnr" in row.metrics else None, row.psnr_spread),
        )
        for row in evaluation.rows
        if row.metrics is not None
    ]
    print_table(columns, rows, right=columns[1:])


def _decibel_cells(mean: float | None, spread: tuple[float, float] | None) -> tuple[str, ...]:
    """Return the cells of a mean, a median and a worst tenth."""
    return tuple(NOTHING if value is None else f"{value:.1f}" for value in (mean, *(spread or (None, None))))


def _print_rows(evaluation: Evaluation) -> None:
    names = [metric.name for metric in evaluation.metrics]
    headings = [f"{metric.title} {metric.unit}".strip() for metric in evaluation.metrics]
    columns = ["setting", "steps of work", *headings]
    rows = [[row.title, *_cells(row, names)] for row in evaluation.rows]
    print_table(columns, rows, right=("steps of work",))


def _cells(row: EvaluatedSetting, names: Sequence[str]) -> list[str]:
    if row.absent or row.metrics is None:
        return [NOTHING, row.absent, *[""] * (len(names) - 1)]
    return [f"{row.cost:.1f}", *(str(row.metrics.get(name, NOTHING)) for name in names)]


def _print_attribution(evaluation: Evaluation) -> None:
    drawn = [row for row in evaluation.rows if row.latent_errors]
    count = len(drawn[0].latent_errors)
    moments = sorted({round(count * (index + 1) / MOMENTS) - 1 for index in range(MOMENTS)} - {-1})
    print_heading("relative error of the latent after step")
    rows = [[row.title, *(f"{row.latent_errors[index]:.2%}" for index in moments)] for row in drawn]
    print_table(["", *(str(index + 1) for index in moments)], rows, right=[str(index + 1) for index in moments])
    if any(row.key == "both" for row in evaluation.rows):  # a quick evaluation leaves it out
        print(f"\ninteraction of quantization and cache: {_interaction(evaluation)}")
    if evaluation.compensation is not None:
        print(f"compensation changes the error by {_decibels(evaluation.compensation)}")
    if evaluation.sites:
        print_heading(f"the quantized layers that hurt most, of {len(evaluation.sites)}")
        sites = [
            (site.site, f"{site.effect:.3%}", f"{_activation(evaluation, site.site):.1f}", f"{site.weight_snr:.1f}")
            for site in evaluation.sites[:WORST_SITES]
        ]
        columns = ("layer", "error of the latent in a step", "activation SNR dB", "weight SNR dB")
        print_table(columns, sites, right=columns[1:])


def _interaction(evaluation: Evaluation) -> str:
    found = evaluation.interaction
    if found is None:
        return "there is none without both"
    if not found.excludes_zero:
        return f"absent, {_decibels(found)} includes 0"
    word = "more" if found.value > 0 else "less"
    return f"the error of both is {_decibels(found)} {word} than the sum of the errors of each"


def _decibels(estimate: BootstrapEstimate) -> str:
    return f"{estimate.value:+.2f} dB ({estimate.low:+.2f} .. {estimate.high:+.2f})"


def _activation(evaluation: Evaluation, site: str) -> float:
    return min(fit.snr for fit in evaluation.scales if fit.site == site)


def _print_problems(evaluation: Evaluation) -> None:
    if evaluation.faults:
        print_heading("faults")
        print_table(("what", "where", "finding"), [(item.kind, item.where, item.message) for item in evaluation.faults])
    if evaluation.verdicts:
        print_heading("gate")
        rows = [("ok" if item.passed else "MISSED", item.term, f"{item.value:.4g}") for item in evaluation.verdicts]
        print_table(("", "condition", "measured"), rows, right=("measured",))
