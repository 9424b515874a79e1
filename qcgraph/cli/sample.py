"""qcgraph sample: samples of a bundle. With ONNX Runtime it imports neither torch nor diffusers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcgraph.cli.output import MOST_SAMPLES, MOST_SEED, MOST_THREADS, count_text
from qcgraph.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from qcgraph.plan.spec import ModelSpec
    from qcgraph.sampling.conditions import Conditions
    from qcgraph.sampling.runner import Array

MOST_BY_DEFAULT = 16
MOST_BYTES = 2**32  # bytes of latents, all of which are in memory until the picture is drawn


def sample_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that qcgraph compile wrote.")],
    count: Annotated[
        int | None,
        typer.Option(
            "-n", "--count", metavar="N", max=MOST_SAMPLES, help="How many; by default one of each class, at most 16."
        ),
    ] = None,
    classes: Annotated[
        list[int] | None, typer.Option("--class", metavar="C", help="A class; can be repeated. By default all in turn.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(metavar="S", max=MOST_SEED, help="Seed of the noise: the same seed is the same noise everywhere."),
    ] = 0,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The picture, a .png file.")] = Path(
        "grid.png"
    ),
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="onnxruntime, torch, tensorrt-rtx or tensorrt; by default the target's."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", max=MOST_THREADS, help="How many threads; by default all cores.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Refuse a bundle made for another number of steps.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="NAME", help="Refuse a bundle made for another scheduler.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="W", help="Refuse a bundle made for another guidance.")
    ] = None,
    save_latents: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the samples, labels and seed to this .npz file, too.")
    ] = None,
) -> None:
    """Draw samples with a bundle.

    The samples are written as a grid of images. The sampling settings are those of the compilation.
    """
    _check_place(output, ".png")
    if save_latents is not None:
        _check_place(save_latents, ".npz")

    from qcgraph.bundle import Bundle
    from qcgraph.evaluation.images import save_grid
    from qcgraph.export.run.open import runner_of, samples_at_once
    from qcgraph.progress import progress_for
    from qcgraph.sampling.loop import sample
    from qcgraph.sampling.noise import check_seed

    opened = Bundle.open(bundle)
    plan, spec = opened.plan, opened.spec
    plan.require(steps=steps, scheduler=scheduler, guidance=guidance)
    _check_amount(count or 0, spec)
    conditions = choose_conditions(count, classes or [], spec)
    check_seed(seed)
    progress = progress_for(sys.stderr)
    runner = runner_of(opened, backend, threads)
    progress.note(f"{spec.name}: {plan.describe()}, seed {seed}")
    together = samples_at_once(runner, plan)
    latents = sample(runner, plan, spec, conditions, seed, batch=together, progress=progress)
    _check_finite(latents, bundle)
    if not spec.is_image:
        progress.note(_latents_note(spec))
    cycle = len(classes or ()) or (spec.label.count if spec.label is not None else None)
    columns = columns_for(len(conditions), cycle or 1)
    save_grid(latents, output, columns, is_image=spec.is_image)
    _print_result(output, conditions, spec, columns)
    if save_latents is not None:
        _save_latents(save_latents, latents, conditions, spec, seed)
        print(save_latents)


def choose_conditions(count: int | None, classes: Sequence[int], spec: ModelSpec) -> Conditions:
    """Return the conditions of the samples: the given classes in turn, or all values of the conditions in turn.

    Raises:
        UsageError: no samples, a class that the model does not know, or classes for a model without classes.
    """
    from qcgraph.sampling.conditions import in_turn, of_labels

    if count is None:
        values = [condition.count for condition in spec.conditions if condition.count is not None]
        count = len(classes) or min(max(values, default=MOST_BY_DEFAULT), MOST_BY_DEFAULT)
    if count < 1:
        raise UsageError("nothing to sample", hint="ask for at least one sample")
    if classes:
        return of_labels([classes[index % len(classes)] for index in range(count)], spec)
    return in_turn(count, spec)


def _check_amount(count: int, spec: ModelSpec) -> None:
    most = MOST_BYTES // (4 * math.prod(spec.latent_shape))
    if count > most:
        raise UsageError(
            f"{count} samples do not fit into one picture" if count < 10**12 else "too many samples for one picture",
            where="--count",
            hint=f"at most {most} at once; draw more in runs with other seeds",
        )


def columns_for(count: int, cycle: int) -> int:
    """Return the number of columns: one for each class of the cycle if this fits, otherwise as many as rows."""
    return min(count, cycle) if 1 < cycle <= MOST_BY_DEFAULT else math.ceil(math.sqrt(count))


def _check_place(path: Path, suffix: str) -> None:
    from qcgraph.files.atomic import check_file

    if path.suffix.lower() != suffix:
        raise UsageError(f"is not a {suffix} file", where=str(path), hint=f"give a name that ends with {suffix}")
    check_file(path)


def _check_finite(latents: Array, bundle: Path) -> None:
    import numpy as np

    broken = int((~np.isfinite(latents)).any(axis=(1, 2, 3)).sum())
    if broken:
        raise VerificationError(
            f"{broken} of {count_text(len(latents), 'sample')} hold NaN or infinity; nothing was written",
            where=str(bundle),
            hint="check it with qcgraph verify; more bits or a shorter cache interval may help",
        )


def _latents_note(spec: ModelSpec) -> str:
    shown = "the first three channels" if spec.latent_shape[0] >= 3 else "the first channel"
    return (
        f"{spec.name} draws latents of an autoencoder, not images: the picture shows {shown}, stretched to full range"
    )


def _print_result(output: Path, conditions: Conditions, spec: ModelSpec, columns: int) -> None:
    """Print the picture's place, and below it the value of each condition for every sample, row by row."""
    print(output)
    for condition in spec.conditions:
        if condition.shape:
            continue
        name = "classes" if condition is spec.label else condition.name
        values = conditions.values[condition.name].tolist()
        for start in range(0, len(values), columns):
            row = " ".join(f"{value:g}" for value in values[start : start + columns])
            print(f"{name if start == 0 else '':{max(len(name), 7) + 1}}{row}")


def _save_latents(path: Path, latents: Array, conditions: Conditions, spec: ModelSpec, seed: int) -> None:
    import numpy as np

    from qcgraph.files.atomic import writing_file

    with writing_file(path) as partial:
        arrays: dict[str, Any] = {
            "labels" if spec.label is not None and name == spec.label.name else name: values
            for name, values in conditions.values.items()
        }
        arrays |= {"latents": latents, "seed": np.asarray(seed)}
        np.savez(partial, **arrays)
