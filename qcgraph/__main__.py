"""``python -m qcgraph`` is the command ``qcgraph``."""

from qcgraph.cli import main

if __name__ == "__main__":
    main()
