"""Linear layers with weights of each kind of token: tokens are gathered by kind, and each is computed once.

Letters: N tokens, D width in, O width out, M kinds of tokens, B samples, S tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derived, host_copy, to_device
from descant.modules.core.rng import uniform_NK
from descant.modules.core.sham import Sham
from descant.modules.moe.routing import KindOrder, Marks


def kind_order(marks: Marks, kinds: int) -> KindOrder:
    """Tokens by kind, as ``marks.order`` has it where it was made before; all are of kind 0 where marks have no kind.

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
    """Rows in another order, whose gradient is a gather too, not a sum at indices."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N, order_N)
        return x_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        x_ND: Tensor = _Reordered.apply(grad_ND, *ctx.saved_tensors)
        return x_ND, None, None


def by_kind(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor, order: KindOrder) -> Tensor:
    """``y_n = f_(kind of n)(x_n)`` of tokens ``[..., D]``, each function on the tokens of its kind alone.

    A function without tokens is not called, and where gradients are recorded called on no rows, so that its parameters
    have a gradient of zeros and ranks agree. Where all are of kind 0 the result is ``f_0(x)`` to the bit.

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
    """Linear layer without bias whose weights are those of the token's kind (Mono-InternVL-1.5): ``y = W_kind x``.

    ``weight`` is of kind 0, under the name that a plain layer has; ``experts.0`` of kind 1, and so on. Where all tokens
    are of kind 0 it computes what a plain layer would, to the bit.
    Source: visual attention experts of Mono-InternVL-1.5 (Luo 2025, arXiv 2507.12566), for Q, K, V and O; the release
    of its first version computes all weights on all tokens and blends, which is the same function.

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
        """All other kinds begin with the weight of kind 0."""
        for expert in self.experts:
            expert.copy_(self.weight)

    @property
    def kinds(self) -> int:
        return 1 + len(self.experts)

    def of(self, kind: int) -> Tensor:
        """The weight of a kind."""
        return self.experts[kind - 1] if kind else self.weight

    def forward(self, x: Tensor, marks: Marks) -> Tensor:  # type: ignore[override]
        functions = [partial(F.linear, weight=self.of(kind)) for kind in range(self.kinds)]
        return by_kind(functions, x, kind_order(marks, self.kinds))


def text_weight(name: str) -> str:
    """The parameter that a visual expert begins with a copy of; no parameter's name for other names.

    >>> text_weight("layers.0.qkv.experts.0")
    'layers.0.qkv.weight'
    """
    return f"{name.rpartition('.experts.')[0]}.weight"


def projected(layer: nn.Module, x: Tensor, marks: Marks) -> Tensor:
    """``layer(x)``, with the marks of its tokens where it has weights of each kind."""
    y: Tensor = layer(x, marks) if isinstance(layer, ModalityLinear) else layer(x)
    return y


def permuted_kinds(kind_BS: Tensor, real_BS: Tensor, seed_B: Tensor) -> Tensor:
    """The kinds of each sample's real tokens in a random order, a pure function of the sample's seed; on the host.

    Real tokens lie first.

    >>> kind_BS, real_BS = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[True, True, True, False]])
    >>> sorted(permuted_kinds(kind_BS, real_BS, torch.tensor([5]))[0, :3].tolist())
    [0, 1, 1]
    """
    u_BS = uniform_NK(seed_B, tuple(f"kind/{s}" for s in range(kind_BS.shape[1])))
    return kind_BS.gather(1, torch.where(real_BS, u_BS, 2.0).argsort(dim=1, stable=True))


class VisualExperts(nn.Module):
    """Weights of their own for the tokens of images in a language model (Mono-InternVL), beside those that it has:

        [q, k, v] = W_qkv^m norm_1(h),   h = h + W_o^m attention(q, k, v),   h = h + FFN^m(norm_2(h)),   m: token's kind

    All tokens attend to one another as before; norms are shared. With the weights of words frozen, what the model
    computes of text alone stays as it is to the bit. Experts begin as copies of these weights.
    Source: Luo 2024 (Mono-InternVL, arXiv 2410.08202), of FFNs; 2025 (1.5, arXiv 2507.12566), of attention too. The
    release of the first computes ``FFN^0(h) (1 - m) + FFN^1(h) m`` of all tokens, which is the same function.

    ``experts(kind_BS, real_BS, seed_B) -> kind_BS``: which tokens they serve.

    Args:
        attention: of Q, K, V and O too, not of FFNs alone.
        documents: for all tokens of a sample with an image, words too: a model of its own for such samples.
        sham: ``permute`` gives them as many real tokens of each sample, at random.

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
            return derived(lambda kind: kind.amax(dim=1, keepdim=True).expand(kind.shape), kind_BS)
        if self.sham.mode is None:
            return kind_BS
        return to_device(permuted_kinds(host_copy(kind_BS), host_copy(real_BS), seed_B), kind_BS.device)
