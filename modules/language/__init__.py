"""Causal language models, generation, packing, and log-probabilities without a full matrix of logits."""

from descant.modules.language.constrained import BlockSampling as BlockSampling
from descant.modules.language.generate import Generated as Generated
from descant.modules.language.generate import Sampling as Sampling
from descant.modules.language.generate import generate as generate
from descant.modules.language.generate import generate_some as generate_some
from descant.modules.language.model import CausalLM as CausalLM
from descant.modules.language.packing import Packed as Packed
from descant.modules.language.packing import PackingCounts as PackingCounts
from descant.modules.language.packing import first_fit_decreasing as first_fit_decreasing
from descant.modules.language.packing import pack as pack
from descant.modules.language.packing import places as places
from descant.modules.language.pretrained import PretrainedLM as PretrainedLM
from descant.modules.language.probabilities import log_probabilities as log_probabilities
