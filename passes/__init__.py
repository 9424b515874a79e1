"""The graph passes: one file a pass, in a room for every method, imported as ``qcgraph.passes``."""

if __name__ != "qcgraph.passes":
    raise ImportError(
        f"this directory is the package qcgraph.passes and was imported as {__name__!r}\n\n"
        "hint: install the project (pip install -e .) and write: import qcgraph.passes",
        name=__name__,
    )
