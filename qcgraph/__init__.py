"""qcgraph: compile Diffusion Transformers into quantized, cached graphs that run several times faster.

``qcgraph.compile(model, recipe, output=...)`` writes a bundle, and ``qcgraph.load(bundle)`` returns its denoiser as a
callable. An import of qcgraph imports neither torch nor a runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcgraph.errors import UsageError, shown

if TYPE_CHECKING:
    from qcgraph.bundle import Bundle
    from qcgraph.models import LoadedModel
    from qcgraph.recipe import Recipe
    from qcgraph.sampling.denoiser import Denoiser

LONGEST_NAME = 4096  # characters of a model's name: the longest path that systems take
__version__ = metadata.version("qcgraph")


def compile(  # noqa: A001 - the verb of the field, as in torch.compile
    model: str | PathLike[str] | LoadedModel,
    recipe: Recipe | str | PathLike[str] | Mapping[str, Any] | None = None,
    *,
    output: PathLike[str] | str,
    plan: PathLike[str] | str | None = None,
    force: bool = False,
) -> Bundle:
    """Compile a denoiser and write a bundle.

    Args:
        model: a model name as on the command line, or a loaded model.
        recipe: a recipe, a preset's name, the path of a TOML file, or the sections of one as a dict such as
            ``{"sampling": {"steps": 20}}``; the defaults when None.
        output: the folder of the bundle.
        plan: a bundle or plan file whose schedule replaces that of the recipe.
        force: whether to replace an existing bundle in the folder.

    Raises:
        QcgraphError: wrong input (`UsageError`, `CaptureError`), or the export does not match (`VerificationError`).
    """
    from qcgraph.bundle.plan_file import read_plan
    from qcgraph.files.documents import as_path
    from qcgraph.recipe import Recipe

    resolved = Recipe.of(recipe)
    place = as_path(output, where="output")
    given = None if plan is None else read_plan(as_path(plan, where="plan"))
    if not isinstance(force, bool):
        raise UsageError(f"{shown(force)} is neither True nor False", where="force", hint="leave it out, or give True")
    from qcgraph.compiler.compilation import compile_model
    from qcgraph.ir.execute import ordinary_torch

    named = _model_or_name(model)
    with ordinary_torch():
        bundle = compile_model(named, resolved, place, plan=given, force=force).bundle
    assert bundle is not None
    return bundle


def _model_or_name(model: object) -> str | LoadedModel:
    from qcgraph.files.documents import is_text
    from qcgraph.models import LoadedModel

    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | PathLike):
        name = fspath(model)
        if isinstance(name, str) and is_text(name) and len(name) < LONGEST_NAME:
            return name
    raise UsageError(
        f"{shown(model)} is no model",
        where="model",
        hint="give a name as on the command line, a folder, or a qcgraph.models.LoadedModel, which is a module with "
        "its ModelSpec and the names of its inputs; of a diffusers pipeline, the folder that it was loaded from",
    )


def load(
    bundle: Path | str, *, backend: str | None = None, threads: int | None = None, own_updates: bool = False
) -> Denoiser:
    """Return the denoiser of a bundle, as a callable that replaces a diffusers transformer.

    All files are read now, so the folder may be replaced or deleted afterwards.

    Args:
        bundle: the folder of the bundle.
        backend: ``onnxruntime`` or ``torch``; on a GPU ``tensorrt-rtx`` or ``tensorrt``, once engines were built. By
            default the runtime of the bundle's target.
        threads: the number of threads that it may use; by default all cores.
        own_updates: whether the host changes latents in another way than the plan's sampler, for example to fill in a
            part of an image. Without it, another guidance weight or scheduler than the plan's is refused.

    Raises:
        BundleError: the bundle is damaged, or cannot run on this backend.
        UsageError: the backend is unknown, not installed, or needs a GPU that is not there; or an argument has the
            wrong type.
    """
    from qcgraph.bundle import Bundle
    from qcgraph.errors import UsageError
    from qcgraph.export.run.open import runner_of
    from qcgraph.sampling.denoiser import Denoiser

    if not isinstance(bundle, (str, Path)) or "\0" in str(bundle):
        raise UsageError(
            f"{bundle!r:.80} is not the path of a bundle", hint="give the folder that qcgraph compile wrote"
        )
    if not isinstance(own_updates, bool):
        raise UsageError(f"own_updates is {own_updates!r:.60}", hint="True or False")
    opened = Bundle.open(bundle)
    return Denoiser(runner_of(opened, backend, threads), opened.plan, opened.spec, own_updates=own_updates)


__all__ = ["__version__", "compile", "load"]
