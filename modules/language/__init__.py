"""Causal language models, generation, packing, and log-probabilities without a full matrix of logits."""

from descant.modules.language.generate import Generated, Sampling, generate, generate_some
from descant.modules.language.model import CausalLM
from descant.modules.language.packing import Packed, first_fit_decreasing, pack, places
from descant.modules.language.pretrained import PretrainedLM
from descant.modules.language.probabilities import log_probabilities

__all__ = [
    "CausalLM",
    "Generated",
    "Packed",
    "PretrainedLM",
    "Sampling",
    "first_fit_decreasing",
    "generate",
    "generate_some",
    "log_probabilities",
    "pack",
    "places",
]
