"""Targets, graph emission and runners, imported as ``qcgraph.export``."""

if __name__ != "qcgraph.export":
    raise ImportError(
        f"this directory is the package qcgraph.export and was imported as {__name__!r}\n\n"
        "hint: install the project (pip install -e .) and write: import qcgraph.export",
        name=__name__,
    )
