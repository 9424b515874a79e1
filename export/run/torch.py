"""A runner of programs in PyTorch, the reference, as the runtime of a bundle or of a program in memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from qcgraph.bundle import Bundle
from qcgraph.bundle.watch import reading
from qcgraph.export.run.runtimes import Exported
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.serialize import PROGRAM, WEIGHTS, load_program


def open_bundle(bundle: Bundle, threads: int | None) -> TorchRunner:
    """Return a runner on the program of a bundle.

    Raises:
        BundleError: the program is missing or damaged, or the bundle was replaced meanwhile.
    """
    for name in (PROGRAM, WEIGHTS):
        bundle.file(name)  # files that the manifest does not name are not run
    _use(threads)
    with reading(bundle, [PROGRAM, WEIGHTS]):
        stored = load_program(bundle.path)
        # Copies, because safetensors maps the file into memory.
        program = replace(stored, constants={name: value.clone() for name, value in stored.constants.items()})
        for variant in program.variants:
            program.module(variant)  # made once, before several threads need it
    return TorchRunner(program)


def open_exported(exported: Exported, threads: int | None) -> TorchRunner:
    """Return a runner on the program, which holds its constants."""
    _use(threads)
    return TorchRunner(exported.program)


def _use(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
