"""Fusion heads: from the latents of all modalities to class logits, and each modality's share of them.

Letters: B samples, T tokens (a class token, then one per modality), D width of a modality's latents, W width inside a
fusion, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise
from math import factorial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from descant.modules.core.batch import only as only
from descant.modules.core.compat.layers import Orthogonal
from descant.modules.core.errors import require_value
from descant.modules.core.host import everyone, host_copy
from descant.modules.core.rows import RowTracker
from descant.modules.towers.image import Block


class FusionHead(nn.Module):
    """Base of fusion heads: ``fusion(z, present) -> logits_BC``.

    A subclass implements ``made``, which makes its layers once widths are known, and ``logits``. Absent samples have
    zeros as latents there, so the content of their rows, even nan or inf, changes nothing and gets no gradient.

    Shapes: ``z``: modality -> float ``[B, D_m]``; ``present``: modality -> bool ``[B]``, all True by default.
    """

    def __init__(self) -> None:
        super().__init__()
        self.row_tracker = RowTracker()
        self.widths: dict[str, int] = {}
        self._detached: tuple[str, ...] = ()

    def build(self, widths: Mapping[str, int], classes: int) -> Self:
        """Make the layers for ``widths``, modality -> width of its latents, and one output per class; return itself."""
        if not widths:
            raise ValueError("widths: a fusion needs at least one modality")
        if classes < 1:
            raise ValueError(f"classes {classes}: at least 1")
        self.widths = dict(widths)
        self.made(self.widths, classes)
        return self

    def made(self, widths: dict[str, int], classes: int) -> None:
        raise NotImplementedError

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def forward(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.logits(*self.check_latents(z, present))

    @contextmanager
    def detaching(self, *modalities: str) -> Iterator[None]:
        """Detach the fusion's inputs ``W_m z_m`` of these modalities within the context: no gradient to W_m and z_m."""
        before, self._detached = self._detached, modalities
        try:
            yield
        finally:
            self._detached = before

    def _part(self, modality: str, x: Tensor) -> Tensor:
        return x.detach() if modality in self._detached else x

    def parts(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Compute the Shapley value of each modality in the logits, ``[B, C]``; with f(none), they sum to the logits.

            phi_m = sum over S without m of  |S|! (M - |S| - 1)! / M!  (f(S and m) - f(S))
            f(all) = f(none) + sum_m phi_m

        f(S) are the logits with only the modalities in S present (Shapley 1953). AGM (Li 2023, arXiv 2308.07686) uses
        them as shares of a fusion, but its sum lacks the empty set. Absent modalities have exactly zero. The cost is
        2^M fusions, or one if shares are additive (LateFusion).
        """
        z, present = self.check_latents(z, present)
        names = tuple(self.widths)
        f = {subset: self(z, only(present, *subset)) for subset in coalitions(names)}
        return {m: share_BC.masked_fill(~present[m][:, None], 0.0) for m, share_BC in shapley(f, names).items()}

    def check_latents(
        self, z: Mapping[str, Tensor], present: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return latents with zeros where absent, and presence, both in the order of the widths."""
        for name, given in (("z", z), ("present", self.widths if present is None else present)):
            missing = next((m for m in self.widths if m not in given), None)
            if missing is not None:
                raise ValueError(f"{name}: no modality {missing!r}, only {', '.join(given) or 'none'}")
        if present is None:
            present = {m: everyone(len(z[m]), z[m].device) for m in self.widths}
        # where, not a product: 0 * inf is nan, in the value and in the gradient
        filled = {m: torch.where(present[m][:, None], z[m], torch.zeros_like(z[m])) for m in self.widths}
        return filled, {m: present[m] for m in self.widths}


def coalitions(names: Sequence[str]) -> list[tuple[str, ...]]:
    """List all subsets, the empty one first, each in the order of the names."""
    return [subset for size in range(len(names) + 1) for subset in combinations(names, size)]


def shapley(f: Mapping[tuple[str, ...], Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Compute Shapley values of f over :func:`coalitions`: ``sum over S without m of |S|! (M - |S| - 1)! / M! (f(S and
    m) - f(S))``.

    >>> f = {(): torch.tensor(0.0), ("a",): torch.tensor(1.0), ("b",): torch.tensor(2.0), ("a", "b"): torch.tensor(5.0)}
    >>> {m: float(x) for m, x in shapley(f, ("a", "b")).items()}
    {'a': 2.0, 'b': 3.0}
    """
    M, shares = len(names), {m: torch.zeros_like(f[()]) for m in names}
    for subset in f:
        for m in subset:
            rest = tuple(n for n in subset if n != m)
            weight = factorial(len(rest)) * factorial(M - len(rest) - 1) / factorial(M)
            shares[m] = shares[m] + weight * (f[subset] - f[rest])
    return shares


class LateFusion(FusionHead):
    """Late fusion, sum of unimodal linear logits: ``logits_b = bias + sum_m W_m z_bm`` over the modalities of sample b.

    The terms ``W_m z_m`` are the Shapley values.

    >>> fusion = LateFusion().build({"image": 4, "text": 3}, classes=2)
    >>> z = {"image": torch.ones(5, 4), "text": torch.ones(5, 3)}
    >>> torch.allclose(fusion(z), fusion.bias_C + fusion.parts(z)["image"] + fusion.parts(z)["text"])
    True
    """

    def made(self, widths: dict[str, int], classes: int) -> None:
        self.maps = nn.ModuleDict({m: nn.Linear(width, classes, bias=False) for m, width in widths.items()})
        self.bias_C = nn.Parameter(torch.zeros(classes))

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        shares_MBC = torch.stack([self._part(m, self.maps[m](z_BD)) for m, z_BD in z.items()])
        return self.bias_C + shares_MBC.sum(dim=0)

    def parts(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {m: self.maps[m](z_BD) for m, z_BD in self.check_latents(z, present)[0].items()}


class OrthogonalFusion(FusionHead):
    """CRMT's fusion: ``logits_bk = bias_k + sum_m a_mk s_bmk``, with ``s_bm = V_m z_bm``, ``V_m V_m^T = 1`` and ``a >
    0``.

    The unimodal scores s, whose gradients at z are orthonormal over classes, are separate from their weights a, one per
    class and modality. So the weights can be trained afterwards. Source: Yang 2024, arXiv 2402.06244; its code only
    normalises the rows of V, and allows negative a.

    Args:
        weight: initial a; 0.1 in the paper, whose latents are several times as long.

    >>> fusion = OrthogonalFusion().build({"image": 4, "text": 3}, classes=2)
    >>> z = {"image": torch.randn(5, 4), "text": torch.randn(5, 3)}
    >>> v_CD = fusion.maps["image"].weight
    >>> torch.allclose(v_CD @ v_CD.T, torch.eye(2), atol=1e-6)
    True
    >>> torch.allclose(fusion(z), fusion.alone(z)["image"] + fusion.alone(z)["text"])
    True
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        require_value(weight > 0, f"weight {weight:g}: above 0, such as 1")
        self.weight = weight

    def made(self, widths: dict[str, int], classes: int) -> None:
        narrow = next((m for m, width in widths.items() if width < classes), None)
        if narrow is not None:
            raise ValueError(
                f"classes {classes}: OrthogonalFusion needs a width of as many; {narrow} has {widths[narrow]}"
            )
        # not torch's Householder map: it rotates V farther in a step than the towers can follow
        self.maps = nn.ModuleDict({m: _orthogonal(nn.Linear(w, classes, bias=False)) for m, w in widths.items()})
        log = torch.full((classes,), self.weight).log()
        self.log_weights = nn.ParameterDict({m: nn.Parameter(log.clone()) for m in widths})
        self.bias_C = nn.Parameter(torch.zeros(classes))

    @property
    def weights(self) -> dict[str, Tensor]:
        """Return modality -> ``a_C``, above zero."""
        return {m: log_C.exp() for m, log_C in self.log_weights.items()}

    def alone(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Compute unimodal scores, modality -> ``s_BC``; zero where absent."""
        return {m: self.maps[m](z_BD) for m, z_BD in self.check_latents(z, present)[0].items()}

    def parts(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        a = self.weights
        return {m: a[m] * s_BC for m, s_BC in self.alone(z, present).items()}

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.bias_C + torch.stack([self._part(m, x) for m, x in self.parts(z, present).items()]).sum(dim=0)


class _Cayley(Orthogonal):
    """torch's Cayley map, with bit-identical results: ``(I - A/2)^-1 (I + A/2)`` with ``A = tril(W) - tril(W)^T``.

    It omits torch's check that the system is solvable, which synchronises an accelerator. The system always is, because
    the eigenvalues of A are imaginary.
    """

    def forward(self, X: Tensor) -> Tensor:
        wide = X.shape[-2] < X.shape[-1]
        X = (X.mT if wide else X).tril()
        n, k = X.shape[-2:]
        X = X if n == k else torch.cat([X, X.new_zeros(n, n - k)], dim=-1)
        A, one = X - X.mT, torch.eye(n, dtype=X.dtype, device=X.device)
        Q, _ = torch.linalg.solve_ex(torch.add(one, A, alpha=-0.5), torch.add(one, A, alpha=0.5))
        Q = self.base @ Q[..., :k]
        return Q.mT if wide else Q


def _orthogonal(linear: nn.Linear) -> nn.Module:
    made = orthogonal(linear, orthogonal_map="cayley")
    cast(Any, made).parametrizations.weight[0].__class__ = _Cayley
    return made


class SharedHead(FusionHead):
    """MLA's fusion: one linear head f for all modalities, weighted by its certainty: ``logits_b = sum_m w_bm f(z_bm)``.

        w_b = softmax over present m of  - H(softmax f(z_bm)),        H the entropy in nats

    Source: Zhang 2024, arXiv 2311.10707; its code takes entropies over the batch instead of the classes, so that all
    samples share two weights.

    >>> fusion = SharedHead().build({"image": 4, "text": 4}, classes=2)
    >>> z, here = {"image": torch.randn(1, 4), "text": torch.randn(1, 4)}, torch.tensor([True])
    >>> torch.allclose(fusion(z, {"image": here, "text": ~here}), fusion.head(z["image"]))
    True
    """

    def made(self, widths: dict[str, int], classes: int) -> None:
        if len(set(widths.values())) > 1:
            each = ", ".join(f"{m} {width}" for m, width in widths.items())
            raise ValueError(f"fusion: SharedHead needs latents of one width; here {each}")
        self.head = nn.Linear(next(iter(widths.values())), classes)

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        f_MBC = torch.stack([self._part(m, self.head(z_BD)) for m, z_BD in z.items()])
        present_MB = torch.stack([present[m] for m in z])
        log_MBC = f_MBC.log_softmax(dim=2)
        entropy_MB = -(log_MBC.exp() * log_MBC).sum(dim=2)
        # finite also for samples without any modality, whose rows are zero
        w_MB = torch.where(present_MB, -entropy_MB, torch.finfo(entropy_MB.dtype).min).softmax(dim=0) * present_MB
        return (w_MB[..., None] * f_MBC).sum(dim=0)


class SoftVoting(FusionHead):
    """Soft voting of unimodal classifiers: ``logits_b = log sum_m w_m softmax(f_m(z_bm))`` over the present modalities.

    ``w = softmax(log_weights)`` over the modalities of a sample; these weights are the only parameters, equal at first.

    Args:
        members: modality -> the built fusion of a classifier that reads only this modality.

    >>> one = LateFusion().build({"image": 4}, classes=2)
    >>> votes = SoftVoting({"image": one}).build({"image": 4}, classes=2)
    >>> z = {"image": torch.randn(3, 4)}
    >>> torch.allclose(votes(z), one(z).log_softmax(dim=1))
    True
    """

    def __init__(self, members: Mapping[str, FusionHead]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)

    def made(self, widths: dict[str, int], classes: int) -> None:
        self.log_weights = nn.ParameterDict({m: nn.Parameter(torch.zeros(())) for m in widths})

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        votes = []
        for m, z_BD in z.items():
            log_BC = self.members[m]({m: z_BD}, {m: present[m]}).log_softmax(dim=1)
            votes.append(self._part(m, self.log_weights[m] + log_BC).masked_fill(~present[m][:, None], -torch.inf))
        any_B1 = torch.stack(list(present.values())).any(dim=0)[:, None]
        # samples without any modality: zeros before the logarithm, so that no gradient is nan
        vote_MBC = torch.where(any_B1, torch.stack(votes), 0.0)
        return torch.where(any_B1, vote_MBC.logsumexp(dim=0).log_softmax(dim=1), 0.0)


class MidFusion(FusionHead):
    """Concatenation and MLP: ``logits_b = MLP(concat_m z_bm)``, with zeros for absent modalities.

    Args:
        hidden: width of the hidden layers.
        layers: number of linear layers, at least 2; one would be LateFusion.

    >>> fusion = MidFusion(hidden=8).build({"image": 4, "text": 3}, classes=2)
    >>> sum(p.numel() for p in fusion.parameters())  # 7 * 8 + 8, 8 * 2 + 2
    82
    """

    def __init__(self, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        require_value(layers >= 2, f"layers {layers}: at least 2; for one linear layer use LateFusion")
        self.hidden, self.layers = hidden, layers

    def made(self, widths: dict[str, int], classes: int) -> None:
        parts: list[nn.Module] = []
        for a, b in pairwise([sum(widths.values()), *[self.hidden] * (self.layers - 1)]):
            parts += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*parts, nn.Linear(self.hidden, classes))

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        z_BD, first = torch.cat(list(z.values()), dim=1), cast(nn.Linear, self.mlp[0])
        if not self._detached:
            return self.mlp(z_BD)
        weights = first.weight.split(list(self.widths.values()), dim=1)
        weight = torch.cat([self._part(m, w) for m, w in zip(z, weights, strict=True)], dim=1)
        z_BD = torch.cat([self._part(m, z_m) for m, z_m in z.items()], dim=1)
        return self.mlp[1:](F.linear(z_BD, weight, first.bias))


class AttentionFusion(FusionHead):
    """Transformer fusion, one token per modality: ``logits_b = V norm(h_b0)``, ``h_b = blocks(c, W_1 z_b1 + e_1, ...,
    W_M z_bM + e_M)``.

    c is the class token, e_m the embedding of a modality. No token attends to absent modalities; a modality that is
    absent in the whole batch has no token.

    Args:
        width: W of the tokens.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of a block's MLP, divided by W.
        dropout: probability on the attention weights and on both branches of a block.

    >>> fusion = AttentionFusion(width=8, depth=1, heads=2).build({"image": 4, "text": 3}, classes=2)
    >>> z, here = {"image": torch.ones(1, 4), "text": torch.ones(1, 3)}, torch.tensor([True])
    >>> lone = fusion(z, {"image": here, "text": ~here})
    >>> torch.equal(lone, fusion(z | {"text": torch.full((1, 3), torch.nan)}, {"image": here, "text": ~here}))
    True
    """

    def __init__(
        self, width: int = 128, depth: int = 1, heads: int = 4, mlp_ratio: float = 2.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require_value(depth >= 1, f"depth {depth}: at least 1 block, or no token attends to another")
        self.width = width
        self.layers = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def made(self, widths: dict[str, int], classes: int) -> None:
        self.maps = nn.ModuleDict({m: nn.Linear(width, self.width) for m, width in widths.items()})
        self.embeddings = nn.ParameterDict({m: nn.Parameter(torch.randn(self.width) * 0.02) for m in widths})
        self.class_W = nn.Parameter(torch.randn(self.width) * 0.02)
        self.out = nn.Linear(self.width, classes)

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        used = [m for m in z if bool(host_copy(present[m]).any())]
        rows, device = len(next(iter(z.values()))), self.class_W.device
        tokens = [self.class_W.expand(rows, -1), *(self._part(m, self.token(z[m], m)) for m in used)]
        h_BTW = torch.stack(tokens, dim=1)
        mask_BT = torch.stack([torch.ones(rows, dtype=torch.bool, device=device), *(present[m] for m in used)], dim=1)
        for layer in self.layers:
            h_BTW = layer(h_BTW, mask_BT[:, None, None])
        logits_BC = self.out(self.norm(h_BTW[:, 0]))
        if torch.is_grad_enabled():
            # DDP needs every parameter: a rank without a modality uses its parameters on one row of zeros
            for m in z:
                if m not in used:
                    with self.row_tracker.select(torch.zeros(1, dtype=torch.long)):
                        idle_1W = self.token(torch.zeros_like(z[m][:1]), m)
                    logits_BC = logits_BC + 0.0 * idle_1W.sum()
        return logits_BC

    def token(self, z_BD: Tensor, modality: str) -> Tensor:
        """Map a modality's latents to its token, ``[B, D] -> [B, W]``."""
        return self.maps[modality](z_BD) + self.embeddings[modality]


def cross_entropy(logits_BC: Tensor, label_B: Tensor, smoothing: float = 0.0) -> Tensor:
    """Compute cross-entropy with label smoothing, ``[B]``: ``-sum_c q_bc log softmax(logits_b)_c``, ``q_bc = (1 -
    smoothing) [c = label_b] + smoothing / C``.

    Rows with a label below 0 (none) hold an arbitrary number.

    >>> round(float(cross_entropy(torch.zeros(1, 4), torch.tensor([2]))), 4)  # log 4
    1.3863
    """
    return F.cross_entropy(logits_BC, label_B.clamp(min=0), reduction="none", label_smoothing=smoothing)


def class_labels(targets: Mapping[str, Tensor], target: str, classes: int) -> Tensor:
    """Return the labels of one target, int64 ``[B]``, below 0 where a sample has none."""
    if target not in targets:
        raise ValueError(f"target: the data has no {target!r}, only {', '.join(targets) or 'none'}")
    label_B = targets[target]
    if label_B.ndim != 1 or label_B.is_floating_point():
        raise ValueError(f"target: {target!r} is not one int64 class a sample")
    most = int(host_copy(label_B).max())
    if most >= classes:
        raise ValueError(f"classes {classes}: a label of {target!r} is {most}")
    return label_B


def require_classes(known: Mapping[str, Sequence[str]], target: str, classes: int, tiny: bool = False) -> None:
    """Raise ValueError with the right number or names unless the data's ``target`` has this number of classes.

    ``tiny`` data may lack some classes.
    """
    if target not in known:
        raise ValueError(f"target: no classes of {target!r} in the data, only of {', '.join(known) or 'none'}")
    count = len(known[target])
    if count > classes or (count < classes and not tiny):
        raise ValueError(f"classes {classes}: the data has {count} of {target!r}")
