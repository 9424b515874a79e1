"""The command line; stdout carries data, stderr carries progress, logs and errors."""

from qcgraph.cli.app import main, run

__all__ = ["main", "run"]
