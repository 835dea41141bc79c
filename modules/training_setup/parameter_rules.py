"""Rules by which an optimizer of a group takes parameters: by their names, shapes and the modules that own them."""

from __future__ import annotations

import re

from torch import Tensor, nn

from descant.modules.core.compat.layers import Conv, ConvTranspose

#: Parts of a name that mark a layer at a model's input or output, or one that chooses experts.
BESIDES = (
    r"\w*embed\w*|stem|patches|inward|outward|adapters|heads?|own|maps|objectives|classifier|score|\w*projection|router"
)


class ParameterRule:
    """Rule that decides whether an optimizer takes a parameter. A subclass needs :meth:`takes` only."""

    def takes(self, name: str, parameter: Tensor, owner: nn.Module) -> bool:
        """Whether to take a parameter, by its full name, itself (any dtype and shape), and the module that owns it."""
        raise NotImplementedError


class HiddenMatrices(ParameterRule):
    """Weights of linear layers and convolutions, except the first and last layers of a model: the parameters for Muon.

    All others are for another optimizer, such as AdamW: embeddings, positions, tokens, norms, biases, scalars, experts
    kept as one tensor, grouped convolutions (each group is a matrix of its own), transposed convolutions, and layers
    whose name has a part that matches ``besides``. A joint layer of queries, keys and values is one matrix.

    Source: Jordan 2024 (kellerjordan.github.io/posts/muon): hidden layers by Muon, those of the input and the output
    and all vectors by AdamW; "all the convolutional filters except the first one" (its release).
    Which names belong to inputs and outputs is our reading.

    Args:
        convolutions: take filters, too, as ConvMuon can; torch.optim.Muon takes 2-D parameters only.
        besides: regular expression; layers are left out if it matches a whole part (between dots) of their names.

    >>> rule, linear = HiddenMatrices(), nn.Linear(2, 2)
    >>> [rule.takes(name, linear.weight, linear) for name in ("layers.0.out.weight", "heads.image.weight")]
    [True, False]
    >>> rule.takes("layers.0.out.bias", linear.bias, linear)
    False
    """

    def __init__(self, convolutions: bool = True, besides: str = BESIDES) -> None:
        try:
            self.besides = re.compile(besides)
        except re.error as error:
            raise ValueError(f"besides {besides!r}: no regular expression: {error}") from None
        self.convolutions = convolutions

    def takes(self, name: str, parameter: Tensor, owner: nn.Module) -> bool:
        *parts, last = name.split(".")
        if any(self.besides.fullmatch(part) for part in parts):
            return False
        if isinstance(owner, Conv):
            whole = owner.groups == 1 and not isinstance(owner, ConvTranspose)
            return self.convolutions and whole and last == "weight"
        if isinstance(owner, nn.MultiheadAttention):
            return parameter.ndim == 2
        return isinstance(owner, nn.Linear) and last == "weight" and parameter.ndim == 2
