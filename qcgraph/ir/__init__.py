"""The intermediate representation: programs of FX graphs, their ops, printer, legality and structure."""
