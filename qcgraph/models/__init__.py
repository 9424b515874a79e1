"""Models that qcgraph compiles: the embedded digits, the original DiT, diffusers folders, your own factory."""

from qcgraph.models.loaded import LoadedModel
from qcgraph.models.registry import ModelInfo, list_models, load_model

__all__ = ["LoadedModel", "ModelInfo", "list_models", "load_model"]
