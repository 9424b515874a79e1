"""Bundle: a folder of data that anybody can inspect, move and run. Written in one piece or not at all; no torch.

Files: ``manifest.json`` (the names of all files, with sha256), ``recipe.lock.toml``, ``plan.json`` (the model, the step
plan and the interface of every variant), ``scheduler/`` (the updates of the plan, for diffusers), the exported graphs,
``program.json`` and ``weights.safetensors`` (the final program), ``ir/NNN_pass.txt`` and ``.diff``, and the report. No
file is code, and none is pickled.

Writing is atomic (see `qcgraph.files.atomic`): a killed process leaves the old bundle or none.
"""

from qcgraph.bundle.manifest import MANIFEST, Manifest
from qcgraph.bundle.read import Bundle, Damage, IrText, is_bundle
from qcgraph.bundle.write import check_output, readable_json, write_plan, write_scheduler, writing

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
    "write_scheduler",
    "writing",
]
