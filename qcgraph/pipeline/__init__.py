"""Passes, pipelines of passes, the instruments that watch them, and estimates of their work."""

from qcgraph.pipeline.pipeline import Instrument, Pass, PassContext, Pipeline, find_pass, make_pass, registry

__all__ = ["Instrument", "Pass", "PassContext", "Pipeline", "find_pass", "make_pass", "registry"]
