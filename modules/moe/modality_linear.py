"""Linear layers with separate weights for each kind of token: they gather tokens by kind and compute each token once.

Letters: N tokens, D width in, O width out, M kinds of tokens, B samples, S tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derive, host_copy, to_device
from descant.modules.core.rng import uniform_NK
from descant.modules.core.sham import Sham
from descant.modules.moe.routing import KindOrder, Marks


def kind_order(marks: Marks, kinds: int) -> KindOrder:
    """Sort tokens by kind, or return ``marks.order`` if it exists already. Marks without kinds mean kind 0 for all.

    >>> kind_order(Marks(kind=torch.tensor([[1, 0], [0, 1]])), kinds=2)
    KindOrder(counts=(2, 2), order_N=tensor([1, 2, 0, 3]), inverse_N=tensor([2, 0, 1, 3]))
    """
    if marks.order is not None:
        return marks.order
    if marks.kind is None:
        return KindOrder(())
    kind_N = host_copy(marks.kind).flatten()
    counts = tuple(kind_N.bincount(minlength=kinds).tolist())
    if len(counts) > kinds:
        raise ValueError(f"a token of kind {len(counts) - 1}; there are 0 to {kinds - 1}")
    if counts[0] == len(kind_N):
        return KindOrder(counts)
    order_N, device = kind_N.argsort(stable=True), marks.kind.device
    return KindOrder(counts, to_device(order_N, device), to_device(order_N.argsort(), device))


class _Reordered(torch.autograd.Function):
    """Reordering of rows whose gradient is a gather as well, instead of a sum at indices."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N, order_N)
        return x_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        x_ND: Tensor = _Reordered.apply(grad_ND, *ctx.saved_tensors)
        return x_ND, None, None


def by_kind(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor, order: KindOrder) -> Tensor:
    """Compute ``y_n = f_(kind of n)(x_n)`` for tokens ``[..., D]``, each function only on the tokens of its kind.

    A function without tokens is not called. If gradients are recorded, it is called on zero rows, so that its
    parameters have a gradient of zeros and ranks agree. If all tokens are of kind 0, the result is ``f_0(x)`` to the
    bit.

    >>> order = kind_order(Marks(kind=torch.tensor([1, 0, 1])), kinds=2)
    >>> by_kind([lambda x: x, lambda x: 2 * x], torch.ones(3, 1), order).flatten().tolist()
    [2.0, 1.0, 2.0]
    """
    grads = torch.is_grad_enabled()
    if order.order_N is None or order.inverse_N is None:
        y = functions[0](x)
        if not grads:
            return y
        none_0D = x.flatten(0, -2)[:0]
        return torch.cat([y.flatten(0, -2), *(f(none_0D) for f in functions[1:])]).view(y.shape)
    x_ND: Tensor = _Reordered.apply(x.flatten(0, -2), order.order_N, order.inverse_N)
    parts = zip(functions, x_ND.split(order.counts), strict=True)
    y_NO: Tensor = torch.cat([f(part) for f, part in parts if grads or len(part)])
    y_NO = _Reordered.apply(y_NO, order.inverse_N, order.order_N)
    return y_NO.unflatten(0, x.shape[:-1])


class ModalityLinear(nn.Linear):
    """Linear layer without bias, with separate weights for each kind of token (Mono-InternVL-1.5): ``y = W_kind x``.

    ``weight`` belongs to kind 0 and has the same name as in a plain layer; ``experts.0`` belongs to kind 1, and so on.
    If all tokens are of kind 0, the result equals that of a plain layer to the bit.
    Source: visual attention experts of Mono-InternVL-1.5 (Luo 2025, arXiv 2507.12566), for Q, K, V and O; the release
    of its first version applies all weights to all tokens and blends the results, which is the same function.

    Args:
        in_features, out_features: D and O. kinds: M.

    >>> layer = ModalityLinear(4, 6)
    >>> layer(torch.ones(2, 3, 4), Marks(kind=torch.tensor([[0, 1, 1], [0, 0, 0]]))).shape
    torch.Size([2, 3, 6])
    """

    def __init__(self, in_features: int, out_features: int, kinds: int = 2) -> None:
        super().__init__(in_features, out_features, bias=False)
        if kinds < 2:
            raise ValueError(f"kinds {kinds}: 2 is the least; of one kind it is a plain layer")
        self.experts = nn.ParameterList(self.weight.detach().clone() for _ in range(kinds - 1))

    @torch.no_grad()
    def copy_to_experts(self) -> None:
        """Copy the weight of kind 0 to all other kinds, as their initial weight."""
        for expert in self.experts:
            expert.copy_(self.weight)

    @property
    def kinds(self) -> int:
        return 1 + len(self.experts)

    def of(self, kind: int) -> Tensor:
        """Return the weight of a kind."""
        return self.experts[kind - 1] if kind else self.weight

    def forward(self, x: Tensor, marks: Marks) -> Tensor:  # type: ignore[override]
        functions = [partial(F.linear, weight=self.of(kind)) for kind in range(self.kinds)]
        return by_kind(functions, x, kind_order(marks, self.kinds))


def text_weight(name: str) -> str:
    """Return the name of the parameter that initializes a visual expert; for other names, no parameter's name.

    >>> text_weight("layers.0.qkv.experts.0")
    'layers.0.qkv.weight'
    """
    return f"{name.rpartition('.experts.')[0]}.weight"


def project_by_kind(layer: nn.Module, x: Tensor, marks: Marks) -> Tensor:
    """Return ``layer(x)``, or ``layer(x, marks)`` if the layer has separate weights for each kind."""
    y: Tensor = layer(x, marks) if isinstance(layer, ModalityLinear) else layer(x)
    return y


def permuted_kinds(kind_BS: Tensor, real_BS: Tensor, seed_B: Tensor) -> Tensor:
    """Shuffle the kinds of each sample's real tokens, as a pure function of the sample's seed; on the host.

    Real tokens must come first.

    >>> kind_BS, real_BS = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[True, True, True, False]])
    >>> sorted(permuted_kinds(kind_BS, real_BS, torch.tensor([5]))[0, :3].tolist())
    [0, 1, 1]
    """
    u_BS = uniform_NK(seed_B, tuple(f"kind/{s}" for s in range(kind_BS.shape[1])))
    return kind_BS.gather(1, torch.where(real_BS, u_BS, 2.0).argsort(dim=1, stable=True))


class VisualExperts(nn.Module):
    """Separate weights for image tokens in a language model (Mono-InternVL), besides its own weights for text:

        [q, k, v] = W_qkv^m norm_1(h),   h = h + W_o^m attention(q, k, v),   h = h + FFN^m(norm_2(h)),   m: token's kind

    All tokens attend to one another as before, and norms are shared. If the text weights are frozen, the outputs for
    pure text stay the same to the bit. Experts start as copies of the text weights.
    Source: Luo 2024 (Mono-InternVL, arXiv 2410.08202), for FFNs; 2025 (1.5, arXiv 2507.12566), for attention as well.
    The release of the first computes ``FFN^0(h) (1 - m) + FFN^1(h) m`` for all tokens, which is the same function.

    ``experts(kind_BS, real_BS, seed_B) -> kind_BS``: the tokens that use the experts.

    Args:
        attention: also for Q, K, V and O, not only for FFNs.
        documents: for all tokens of a sample with an image, its words included: a separate model for such samples.
        sham: ``permute`` gives the experts equally many real tokens of each sample, chosen at random.

    >>> VisualExperts(documents=True)(torch.tensor([[0, 1], [0, 0]]), torch.ones(2, 2).bool(), torch.arange(2)).tolist()
    [[1, 1], [0, 0]]
    """

    def __init__(
        self, attention: bool = False, documents: bool = False, sham: Literal["permute"] | None = None
    ) -> None:
        super().__init__()
        self.attention, self.documents, self.sham = attention, documents, Sham(sham)

    def forward(self, kind_BS: Tensor, real_BS: Tensor, seed_B: Tensor) -> Tensor:
        self.sham.calls += self.training
        if self.documents:
            return derive(lambda kind: kind.amax(dim=1, keepdim=True).expand(kind.shape), kind_BS)
        if self.sham.mode is None:
            return kind_BS
        return to_device(permuted_kinds(host_copy(kind_BS), host_copy(real_BS), seed_B), kind_BS.device)
