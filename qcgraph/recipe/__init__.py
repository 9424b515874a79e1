"""Recipes, presets and gates: the settings of a compilation."""

from qcgraph.recipe.recipe import AUTO_BITS, PRESETS, Calibration, Recipe, preset_names

__all__ = ["AUTO_BITS", "PRESETS", "Calibration", "Recipe", "preset_names"]
