"""Load the models that qcgraph compiles: trained digits, the original DiT, diffusers folders, your own factory."""

from qcgraph.models.judge import Judge
from qcgraph.models.loaded import LoadedModel
from qcgraph.models.registry import CodeError, ModelInfo, check_loaded, lasting_name, list_models, load_model

__all__ = [
    "CodeError",
    "Judge",
    "LoadedModel",
    "ModelInfo",
    "check_loaded",
    "lasting_name",
    "list_models",
    "load_model",
]
