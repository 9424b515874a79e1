"""The command line. stdout is data, stderr is progress, logs and errors."""

from qcgraph.cli.app import main, run

__all__ = ["main", "run"]
