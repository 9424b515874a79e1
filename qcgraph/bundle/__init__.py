"""Bundle: a folder that a stranger can inspect, move and run. Written in one piece or not at all; no torch.

Files: ``manifest.json`` (what is in the folder, with sha256), ``recipe.lock.toml``, ``plan.json`` (the model, the step
plan and the interface of every variant), the exported graphs, ``program.json`` and ``weights.safetensors`` (the final
program), ``ir/NNN_pass.txt`` and ``.diff``, and the report. Nothing in it is code, nothing is pickled.

Writing is atomic (see `qcgraph.files.atomic`): a process that is killed leaves the old bundle or none.
"""

from qcgraph.bundle.manifest import MANIFEST, Manifest
from qcgraph.bundle.read import Bundle, Damage, IrText, is_bundle
from qcgraph.bundle.write import check_output, readable_json, write_plan, writing

__all__ = [
    "MANIFEST",
    "Bundle",
    "Damage",
    "IrText",
    "Manifest",
    "check_output",
    "is_bundle",
    "readable_json",
    "write_plan",
    "writing",
]
