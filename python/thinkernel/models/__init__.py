"""The reference decoder: configuration, model, sampling, weights in and out."""

from thinkernel.models.cache import Cache
from thinkernel.models.config import ModelConfig
from thinkernel.models.generate import Generation, generate
from thinkernel.models.hf import config_from_hf, from_hf, hf_weights, load, load_hf_weights, save
from thinkernel.models.presets import PRESETS, preset
from thinkernel.models.transformer import ModelOutput, Transformer

__all__ = [
    "PRESETS",
    "Cache",
    "Generation",
    "ModelConfig",
    "ModelOutput",
    "Transformer",
    "config_from_hf",
    "from_hf",
    "generate",
    "hf_weights",
    "load",
    "load_hf_weights",
    "preset",
    "save",
]
