"""Rules by which an optimizer of a group takes parameters: by their names, shapes and the modules that they are of."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

#: Parts of a name that say that a layer reads a model's input, or gives its output or a choice of experts.
BESIDES = (
    r"\w*embed\w*|stem|patches|inward|outward|adapters|heads?|own|maps|objectives|classifier|score|\w*projection|router"
)


class ParameterRule:
    """Whether an optimizer takes a parameter; :meth:`takes` is all that a rule has."""

    def takes(self, name: str, parameter: Tensor, owner: nn.Module) -> bool:
        """By the parameter's full name, the parameter (any dtype and shape), and the module that it is of."""
        raise NotImplementedError


class HiddenMatrices(ParameterRule):
    """Weights of linear layers and convolutions, but the first and the last of a model: the parameters for Muon.

    All others are for another optimizer, such as AdamW: embeddings, positions, tokens, norms, biases, scalars, experts
    kept as one tensor, convolutions in groups (each group is a matrix of its own) and transposed ones, and layers of
    which a part of the name is one that ``besides`` names. A layer of queries, keys and values in one is one matrix.

    Source: Jordan 2024 (kellerjordan.github.io/posts/muon): hidden layers by Muon, those of the input and the output
    and all vectors by AdamW; "all the convolutional filters except the first one" (its release).
    Which names are those of
    inputs and outputs is our reading.

    Args:
        convolutions: take filters, too, as ConvMuon can; torch.optim.Muon takes 2-D parameters only.
        besides: regular expression of the parts of a name (between dots, whole) whose layers are left out.

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
        if isinstance(owner, _ConvNd):
            whole = owner.groups == 1 and not isinstance(owner, _ConvTransposeNd)
            return self.convolutions and whole and last == "weight"
        if isinstance(owner, nn.MultiheadAttention):
            return parameter.ndim == 2
        return isinstance(owner, nn.Linear) and last == "weight" and parameter.ndim == 2
