"""Compile a model by a recipe, and report quality and cost; the only package that imports all other packages."""
