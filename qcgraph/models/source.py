"""Find and load the model that a bundle was compiled from, and recognise it by the digest of its weights."""

from __future__ import annotations

from qcgraph.bundle import Bundle
from qcgraph.capture.capture import capture
from qcgraph.errors import UsageError
from qcgraph.ir.program import Program
from qcgraph.models import CodeError, LoadedModel, load_model


def find_model(bundle: Bundle, name: str | None = None) -> LoadedModel:
    """Load the model that a bundle was compiled from.

    The model is loaded, not compared; `captured_origin` checks that it is the compiled one. A bundle is data: a file or
    folder of weights that it names is read, but a function that it names is never imported.

    Args:
        bundle: the bundle.
        name: the name of the model, as for `qcgraph.models.load_model`; by default the name that was typed when the
            bundle was compiled, with relative paths relative to the current folder. See `lasting_name`.

    Raises:
        UsageError: the model cannot be found or loaded, or the bundle names a function.
    """
    if name is not None:
        return load_model(name)
    recorded = _recorded_source(bundle)
    try:
        return load_model(recorded, calls=False)
    except CodeError as error:
        raise UsageError(
            f"was compiled from {recorded!r}, and what a bundle names is not called: it may come from a stranger",
            where=str(bundle.path),
            hint=f"name it yourself, if you trust it: --model {recorded}",
        ) from error
    except UsageError as error:
        raise UsageError(
            f"cannot load the model that the bundle was compiled from, {recorded!r}: {error.message}",
            where=str(bundle.path),
            hint="say where it is now: --model NAME, for example --model dit-xl-2:FILE.pt",
        ) from error


def captured_origin(bundle: Bundle, model: LoadedModel) -> Program:
    """Capture the model of a bundle, as the compilation did before its first pass.

    Returns:
        The program with the single variant ``main``, in full precision; it has no step plan.

    Raises:
        UsageError: the bundle was compiled from a model with other weights.
        CaptureError: the model cannot be captured.
    """
    program = capture(model.module, model.spec, model.input_names)
    found, expected = program.constants_digest, bundle.plan.fingerprint.model
    if found != expected:
        raise UsageError(
            f"was compiled from another model: its weights have the digest {expected}, those of "
            f"{model.spec.name} have {found}",
            where=str(bundle.path),
            hint="give --model the name, file or folder that the bundle was compiled from",
        )
    return program


def _recorded_source(bundle: Bundle) -> str:
    """Return the name that was typed for the compilation, or the model's own name if an object was compiled."""
    report = bundle.report
    return report.source if report and report.source is not None else bundle.spec.name
