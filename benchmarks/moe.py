"""Sparse experts beside a dense layer of equal active FLOPs, transformers' Mixtral, and blending all experts.

Letters: N tokens, D width, F hidden width of an expert, P prompts, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import Row
from benchmarks.generate import decoders
from benchmarks.timing import AS_FAST, ratio
from descant.modules.language import CausalLM
from descant.modules.moe import (
    ExpertLayers,
    HardModality,
    Marks,
    ModalityLinear,
    MoELayer,
    Router,
    TopKRouter,
    TopPRouter,
)

#: Tokens, width and hidden width of a layer; number of experts, and of experts per token.
N, D, HIDDEN, E, K = 4096, 256, 512, 8, 2
#: Bars: time over a dense layer; time over computing all and blending; time over the share of slots that run.
DENSE, BLEND, PROPORTIONAL = 1.25, 0.65, (0.85, 1.15)
#: transformers' time of decoding / ours.
DECODE = 1.5


class Dense(nn.Module):
    """A feed-forward layer of the Llama family."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * hidden, bias=False), nn.Linear(hidden, D, bias=False)

    def forward(self, h_ND: Tensor) -> Tensor:
        gate, up = self.gate_up(h_ND).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def layer(router: Router, experts: int = E, marks: Marks | None = None) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    made = MoELayer(D, HIDDEN, experts, router)
    return lambda h_ND: made(h_ND, *([] if marks is None else [marks]))[0]


def tokens() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()


def forth_and_back(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    h_ND = tokens()

    def step() -> None:
        h_ND.grad = None
        function(h_ND).sum().backward()

    return step


def against_dense(pairs: int = 30) -> Iterator[Row]:
    """Measure forward and backward of 8 experts, top-2, over those of a dense layer of equal active FLOPs."""
    result = ratio(forth_and_back(Dense(K * HIDDEN)), forth_and_back(layer(TopKRouter(K))), pairs)
    yield Row.at_most("moe/time_of_dense", result.value, DENSE, result.interval)


def against_mixtral(pairs: int = 30) -> Iterator[Row]:
    """Measure forward and backward of transformers' Mixtral block with the same weights: its time / ours."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": HIDDEN, "num_local_experts": E, "num_experts_per_tok": K}
    theirs, ours = MixtralSparseMoeBlock(MixtralConfig(**sizes)), MoELayer(D, HIDDEN, E, TopKRouter(K))
    weights = {"gate.weight": "router.gate_ED", "experts.gate_up_proj": "experts.gate_up"}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            ours.get_parameter(weights.get(name, "experts.down")).copy_(p.normal_(std=0.05))
        apart = (theirs(tokens()[None])[0] - ours(tokens())[0]).abs().max()
    yield Row.at_most("moe/outputs_of_mixtral", float(apart), 1e-5)
    result = ratio(forth_and_back(lambda h: ours(h)[0]), forth_and_back(lambda h: theirs(h[None])[0]), pairs)
    yield Row.at_least("moe/step_vs_mixtral", result.value, AS_FAST, result.interval)


def hard(pairs: int = 30) -> Iterator[Row]:
    """Measure two experts by kind, half of the tokens each: the time of a gather over computing both and blending."""
    kind_N = torch.arange(N) % 2
    text, image = Dense(HIDDEN), Dense(HIDDEN)
    mask_N1 = kind_N[:, None].float()

    def blended(h_ND: Tensor) -> Tensor:
        return (1 - mask_N1) * text(h_ND) + mask_N1 * image(h_ND)

    gathered = forth_and_back(layer(HardModality([0, 1]), 2, Marks(kind_N)))
    result = ratio(forth_and_back(blended), gathered, pairs)
    yield Row.at_most("moe/gather_over_blend", result.value, BLEND, result.interval)


def linear(pairs: int = 30) -> Iterator[Row]:
    """Measure Q, K and V by kind, half of the tokens each: the time of a gather over computing both and blending."""
    torch.manual_seed(0)
    marks, made = Marks(torch.arange(N) % 2), ModalityLinear(D, 3 * D)
    nn.init.normal_(made.experts[0], std=0.02)
    mask_N1 = (torch.arange(N) % 2)[:, None].float()

    def blended(h_ND: Tensor) -> Tensor:
        return (1 - mask_N1) * F.linear(h_ND, made.weight) + mask_N1 * F.linear(h_ND, made.experts[0])

    apart = (blended(tokens()) - made(tokens(), marks)).detach().abs().max()
    yield Row.at_most("moe/linear_gather_from_blend", float(apart), 1e-6)
    result = ratio(forth_and_back(blended), forth_and_back(lambda h: made(h, marks)), pairs)
    yield Row.at_most("moe/linear_gather_over_blend", result.value, BLEND, result.interval)


def null(pairs: int = 30) -> Iterator[Row]:
    """Measure time with null experts over the share of slots that run, relative to the time without."""
    torch.manual_seed(0)
    made = MoELayer(D, HIDDEN, E, TopPRouter(0.4))
    other = MoELayer(D, HIDDEN, E // 2, TopPRouter(0.4, null_experts=E // 2))
    other.router.load_state_dict(made.router.state_dict())
    share = other.router(tokens()).runs(E // 2).sum() / made.router(tokens()).runs(E).sum()
    result = ratio(forth_and_back(lambda h: other(h)[0]), forth_and_back(lambda h: made(h)[0]), pairs)
    yield Row.within("moe/time_by_share_of_null", 1 / (float(share) * result.value), PROPORTIONAL)


def decode(pairs: int = 30, new: int = 32, rows: int = 16) -> Iterator[Row]:
    """Measure greedy decoding of 16 rows: transformers' time for the same Mixtral / ours."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=E,
        num_experts_per_tok=K,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    theirs = MixtralForCausalLM(config).eval()
    theta = config.rope_parameters["rope_theta"]
    ours = CausalLM(512, 128, 4, 4, 2, 172, 512, theta, experts=ExpertLayers(E, TopKRouter(K))).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim > 1:
                p.mul_(3)  # makes the most probable token unambiguous
    ours.load_llama(theirs.state_dict())
    theirs.generation_config.eos_token_id = None
    ids_PT = torch.randint(3, 512, (rows, 64), generator=torch.Generator().manual_seed(1))
    mine, owner = decoders(ours, theirs, ids_PT, 1, new)
    if not torch.equal(mine(), owner()):
        raise AssertionError("other tokens than transformers'")
    result = ratio(mine, owner, pairs)
    yield Row.at_least("moe/decode", result.value, DECODE, result.interval)


def moe(pairs: int = 30) -> Iterator[Row]:
    """Run all benchmarks of experts."""
    for part in (against_dense, against_mixtral, hard, linear, null, decode):
        yield from part(pairs)
