"""MCR, multimodal competition regularizer: mutual-information games, label contrast and bottleneck (arXiv 2411.07335).

Letters: B samples, D width of a modality's latents, C classes, S permutations, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.errors import require_value
from descant.modules.core.host import derive
from descant.modules.core.objective import Term
from descant.modules.core.ranks import first_row, gather
from descant.modules.core.sham import partners


def js_divergence(a_BC: Tensor, b_BC: Tensor) -> Tensor:
    """Compute ``(KL(p, m) + KL(q, m)) / 2``, ``[B]``, of two logits' softmax p and q, ``m = (p + q) / 2``; in nats.

    >>> js_divergence(torch.tensor([[50.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, 50.0], [1.0, 2.0]])).tolist()
    [0.6931471824645996, 0.0]
    """
    log_p, log_q = a_BC.log_softmax(dim=-1), b_BC.log_softmax(dim=-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.full((), 2.0, dtype=log_p.dtype, device=log_p.device).log()
    kl = [F.kl_div(log_m, log, reduction="none", log_target=True).sum(dim=-1) for log in (log_p, log_q)]
    return (kl[0] + kl[1]) / 2


class Game(Regularizer):
    """Mutual-information game of the modalities over the fused logits: one term, "game".

        D(a; i) = mean_s JS(f with z_i of other samples, f),        where player a alone takes a gradient
        value_b = weight sum over players a and modalities i of  stake(a, i) D_b(a; i)

    For f with z_i of others, latents are permuted along S random cycles through the samples of this micro-batch that
    have i, so no tower runs again. The undisturbed f gets its gradient as well, and so does the fusion. Samples with
    one modality add zero. A game also needs a loss of the decision (a cross-entropy), or logits grow for ever.
    Source: Kontras 2024 (MCR, arXiv 2411.07335), for two modalities; the sum over more is our reading.

    Args:
        weight: weight of the term. permutations: S.
        detach: part of the other modalities that gets no gradient in D: ``projections``, W_m z_m, as in the authors'
            release, or ``latents``, only z_m (our variant). The gradients at z are the same. Those at W_m of a greedy
            game cancel with ``latents``; with ``projections`` W_m plays like its latents.
    """

    by_rank = "permutes latents among the rows of a micro-batch"

    def __init__(
        self, weight: float = 0.1, permutations: int = 8, detach: Literal["projections", "latents"] = "projections"
    ) -> None:
        super().__init__()
        require_value(permutations >= 1, f"permutations {permutations}: 1 is the least")
        self.weight, self.permutations, self.detach = weight, permutations, detach

    def stake(self, player: str, disturbed: str, modalities: int) -> float:
        """Return the coefficient of D(player; disturbed): negative to maximise it, positive to minimise it."""
        raise NotImplementedError

    def forward(self, context: FusionContext) -> dict[str, Term]:
        z, present = context.inputs.z, context.present
        several_B = derive(_several, *present.values())
        value_B = torch.zeros_like(context.logits_BC[:, 0])
        for i in z:
            plays_B = derive(torch.logical_and, several_B, present[i])
            sources = [partners(context.batch.rng_seed, plays_B, "game", i, s) for s in range(self.permutations)]
            source_SB = torch.stack(sources).flatten()
            for a in z:
                stake = self.stake(a, i, len(z))
                if stake:
                    still = self.still(z, a)
                    moving = {m: z_BD.detach() if m in still else z_BD for m, z_BD in z.items()}
                    with context.fusion.detaching(*still if self.detach == "projections" else ()):
                        d_B = self.divergence_without(context, moving, present, i, source_SB)
                    value_B = value_B + stake * torch.where(plays_B & present[a], d_B, 0.0)
        return {"game": Term(self.weight * value_B, valid=several_B, norm=context.rows)}

    def still(self, z: Mapping[str, Tensor], player: str) -> tuple[str, ...]:
        """Return the modalities that get no gradient when latents are permuted."""
        return tuple(m for m in z if m != player)

    def divergence_without(
        self, context: FusionContext, z: dict[str, Tensor], present: Mapping[str, Tensor], i: str, source_SB: Tensor
    ) -> Tensor:
        """Compute ``d_B``, the mean divergence from the undisturbed logits with z_i permuted along S cycles."""
        S = self.permutations
        z_SB = {m: z_BD[source_SB] if m == i else z_BD.repeat(S, 1) for m, z_BD in z.items()}
        f_SBC = context.fuse(z_SB, {m: derive(lambda x: x.repeat(S), x_B) for m, x_B in present.items()})
        return js_divergence(f_SBC, context.logits_BC.repeat(S, 1)).unflatten(0, (S, -1)).mean(dim=0)


def _several(*masks: Tensor) -> Tensor:
    return torch.stack(masks).sum(dim=0) > 1


class IndependentGame(Game):
    """Game in which each modality maximises the influence of its own latents: ``- sum_a D(a; a)``."""

    def stake(self, player: str, disturbed: str, modalities: int) -> float:
        return -1.0 if player == disturbed else 0.0


class GreedyGame(Game):
    """Game in which each modality maximises the influence of its own latents and minimises that of the others:

        sum_a ( - D(a; a) + 1 / (M - 1) sum_{i != a} D(a; i) )

    For two modalities that all samples have, its value is always zero, but its gradients at the latents are not.
    """

    def stake(self, player: str, disturbed: str, modalities: int) -> float:
        return -1.0 if player == disturbed else 1.0 / (modalities - 1)


class CollaborativeGame(Game):
    """Game in which all modalities maximise the influence of each: ``- sum_i D(i)``; all latents get a gradient."""

    def stake(self, player: str, disturbed: str, modalities: int) -> float:
        return -1.0 if player == disturbed else 0.0  # once each

    def still(self, z: Mapping[str, Tensor], player: str) -> tuple[str, ...]:
        return ()


def nt_xent(sim_AG: Tensor, positive_AG: Tensor, negative_AG: Tensor) -> Tensor:
    """Sum ``- log(e^s_p / (e^s_p + sum over negatives n of e^s_n))`` over each anchor's positives p, ``[A]``.

    >>> sim_AG, one_AG = torch.zeros(1, 4), torch.tensor([[True, True, False, False]])
    >>> round(nt_xent(sim_AG, one_AG, ~one_AG).item(), 4)  # 2 log 3
    2.1972
    """
    lowest = torch.finfo(sim_AG.dtype).min  # not -inf: an anchor without negatives stays finite, and adds 0
    negatives_A1 = sim_AG.masked_fill(~negative_AG, lowest).logsumexp(dim=1, keepdim=True)
    return torch.where(positive_AG, torch.logaddexp(sim_AG, negatives_A1) - sim_AG, 0.0).sum(dim=1)


class LabelContrast(Regularizer):
    """MCR's supervised contrast (NT-Xent) of the latents of all modalities: one term, "contrast".

        L = mean over pairs (a, p) of one label, of  - log(e^s_ap / (e^s_ap + sum over n of another label of e^s_an))

    with ``s = z_a . z_p / temperature`` over the unit-length latents of all modalities and ranks that are present and
    labelled. A sample's value is the sum of its latents' pairs, scaled so that the mean over samples is L. Source:
    Kontras 2024 (MCR, arXiv 2411.07335); :class:`CrossModalSupCon` is our variant.

    Args:
        weight: weight of the term. temperature: divisor of the similarities.
    """

    in_batch_negatives = True

    def __init__(self, weight: float = 1.0, temperature: float = 0.1) -> None:
        super().__init__()
        require_value(temperature > 0, f"temperature {temperature:g}: above 0, such as 0.1")
        self.weight, self.temperature = weight, temperature

    def forward(self, context: FusionContext) -> dict[str, Term]:
        z, present, label_B = context.inputs
        u_AD = F.normalize(torch.cat(list(z.values())), dim=1)
        here_MB = torch.stack([present[m] & (label_B >= 0) for m in z])
        label_A, here_A, any_B = label_B.repeat(len(z)), here_MB.flatten(), here_MB.any(dim=0)
        both_AG, same_AG = here_A[:, None] & gather(here_A), label_A[:, None] == gather(label_A)
        positive_AG = same_AG & both_AG
        positive_AG.diagonal(first_row(len(u_AD))).fill_(False)  # a latent is not its own pair
        pairs = gather(positive_AG.sum(dim=1)).sum().clamp(min=1)
        sum_A = nt_xent(u_AD @ gather(u_AD).T / self.temperature, positive_AG, ~same_AG & both_AG)
        value_B = sum_A.unflatten(0, here_MB.shape).sum(dim=0) * gather(any_B).sum() / pairs
        return {"contrast": Term(self.weight * value_B, valid=any_B, norm=context.rows)}


class CrossModalSupCon(LabelContrast):
    """Supervised contrast between latents of two modalities (our variant of MCR's): one term, "contrast".

        value_b = mean over p with y_p = y_b of  - log softmax_p (z_a,b . z_c,p / temperature),  both ways, all pairs

    with latents of unit length, over the samples of all ranks that have both. Latents of one modality are not negatives
    of each other, and all positives are in the denominator. Source: Khosla 2020, arXiv 2004.11362, between modalities.
    Arguments: those of :class:`LabelContrast`.
    """

    def forward(self, context: FusionContext) -> dict[str, Term]:
        z, present, label_B = context.inputs
        u = {m: F.normalize(z_BD, dim=1) for m, z_BD in z.items()}
        label_G, all_G = gather(label_B), {m: gather(u_BD) for m, u_BD in u.items()}
        total_B, any_B = torch.zeros_like(context.logits_BC[:, 0]), torch.zeros_like(label_B, dtype=torch.bool)
        for a, c in combinations(z, 2):
            both_B = present[a] & present[c] & (label_B >= 0)
            both_G = gather(both_B)
            same_BG = (label_B[:, None] == label_G) & both_G
            for one, other in ((a, c), (c, a)):
                sim_BG = (u[one] @ all_G[other].T / self.temperature).masked_fill(~both_G, -torch.inf)
                # rows that lack one get equal similarities, so that they stay finite
                sim_BG = torch.where(both_B[:, None], sim_BG, 0.0)
                log_BG = torch.where(same_BG, sim_BG.log_softmax(dim=1), 0.0)
                value_B = -log_BG.sum(dim=1) / same_BG.sum(dim=1).clamp(min=1)
                total_B = total_B + torch.where(both_B, value_B, 0.0) / 2
            any_B = any_B | both_B
        return {"contrast": Term(self.weight * total_B, valid=any_B, norm=context.rows)}


class Bottleneck(Regularizer):
    """Conditional-entropy bottleneck: predict the latents from the logits; one term, "bottleneck".

        value_b = mean over numbers of  ([z_1 ... z_M]_b - g(logits_b))^2,      g: two linear layers, no bias

    with no gradient to the logits (the conditional entropy bound of MCR). Absent modalities do not count.

    Args:
        weight: weight of the term. hidden: width inside g.
    """

    def __init__(self, weight: float = 1.0, hidden: int = 256) -> None:
        super().__init__()
        self.weight, self.hidden = weight, hidden

    def build(self, widths: Mapping[str, int], classes: int) -> Self:
        self.widths = dict(widths)
        out = sum(widths.values())
        self.g = nn.Sequential(
            nn.Linear(classes, self.hidden, bias=False), nn.ReLU(), nn.Linear(self.hidden, out, bias=False)
        )
        return self

    def forward(self, context: FusionContext) -> dict[str, Term]:
        z, present, _ = context.inputs
        guess = dict(
            zip(self.widths, self.g(context.logits_BC.detach()).split(list(self.widths.values()), 1), strict=True)
        )
        here = {m: present[m][:, None] for m in self.widths}
        off_B = torch.stack([torch.where(here[m], z[m] - guess[m], 0.0).square().sum(dim=1) for m in self.widths]).sum(
            dim=0
        )
        count_B = torch.stack([present[m] * width for m, width in self.widths.items()]).sum(dim=0)
        return {"bottleneck": Term(self.weight * off_B / count_B.clamp(min=1), valid=count_B > 0, norm=context.rows)}
