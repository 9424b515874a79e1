"""Passes in order: what a pass is, what watches it, and what it costs."""

from qcgraph.pipeline.pipeline import Instrument, Pass, PassContext, Pipeline, find_pass, make_pass, registry

__all__ = ["Instrument", "Pass", "PassContext", "Pipeline", "find_pass", "make_pass", "registry"]
