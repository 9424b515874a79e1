"""Run a reproducer: the program before a failing pass, and the rest of the pipeline.

    python tools/replay.py out.reproducer

A compilation whose pass fails leaves such a folder; this tool shows the failure again, with its traceback.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qcgraph.files.folder import read_file
from qcgraph.ir.serialize import load_program
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.instruments import PrintAfter, Timer
from qcgraph.progress import progress_for


def main() -> None:
    """Load the reproducer, and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--print-after", action="append", default=[], help="a pass, or all")
    options = parser.parse_args()
    progress = progress_for(sys.stderr)
    program = load_program(options.folder)
    pipeline = Pipeline.parse(read_file(options.folder, "pipeline.txt").decode().strip())
    progress.note(f"replaying {pipeline.text}")
    pipeline.run(program, [Timer(progress), PrintAfter(tuple(options.print_after), sys.stdout)], progress)
    progress.note("it did not fail")


if __name__ == "__main__":
    main()
