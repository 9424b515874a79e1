"""Run the command ``qcgraph`` by ``python -m qcgraph``."""

from qcgraph.cli import main

if __name__ == "__main__":
    main()
