"""Pseudo captions: sentences from each attribute's phrase that fits an image best (divide, conquer, combine).

Letters: N images, P phrases, A attributes, K templates, D width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.errors import hint, require_value
from descant.modules.core.rng import uniform_NK

#: File of pseudo captions, as ``descant predict`` writes it with WritePseudoCaptions.
CAPTIONS = "captions.parquet"
_FIELD = re.compile(r"\{(\w+)\}")


def best_phrases(z_ND: Tensor, z_PD: Tensor, centred: bool = False) -> Tensor:
    """Find the phrase whose embedding is the most similar to each image's, int64 ``[N]``; of equal ones the first.

        argmax over p of cos(z_n, z_p)        centred: minus the mean of cos(z_n', z_p) over all images n'

    A pure function in float64. With ``centred``, a phrase that is near to every image is not chosen for all of them.

    >>> z_ND, z_PD = torch.tensor([[1.0, 0.1], [1.0, 0.3]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> best_phrases(z_ND, z_PD).tolist(), best_phrases(z_ND, z_PD, centred=True).tolist()
    ([0, 0], [0, 1])
    """
    s_NP = F.normalize(z_ND.double(), dim=1) @ F.normalize(z_PD.double(), dim=1).T
    return (s_NP - s_NP.mean(dim=0) if centred else s_NP).argmax(dim=1)


def label_precision(choice_N: Tensor, true_NP: Tensor) -> tuple[float, float]:
    """Compute the share of correct choices among images with a true phrase, and that of random choices.

    ``true_NP``: bool. Both are nan if no phrase is true of any image.

    >>> label_precision(torch.tensor([0, 1, 1]), torch.tensor([[True, False], [True, False], [False, False]]))
    (0.5, 0.5)
    """
    some_N = true_NP.any(dim=1)
    hit_N = true_NP.gather(1, choice_N[:, None])[:, 0]
    return float(hit_N[some_N].double().mean()), float(true_NP[some_N].double().mean())


class PseudoCaptions:
    """Captions for images without text, by a model of images and texts that knows the words of the phrases.

    * Divide: a description has attributes, each with a closed list of phrases.
    * Conquer: each attribute gets the phrase that is the most similar to the image (:func:`best_phrases`).
    * Combine: each caption of an image fills a different template, in an order that is drawn for the image.

    Source: UniPT (Shao 2023, arXiv 2309.01420). Its release has no code for this; templates, draws and ``centred`` are
    our reading.

    Args:
        attributes: name -> phrases.
        templates: sentences with names of attributes in braces, such as ``a {colour} {kind}``; not all have to occur.
        captions: number of captions per image, each from a different template.
        prompt: text that the model reads for a phrase, which replaces ``{}``.
        centred: see :func:`best_phrases`.

    >>> attributes = {"colour": ["red", "blue"], "kind": ["ball", "hat"]}
    >>> captions = PseudoCaptions(attributes, ["a {colour} {kind}", "{kind}"], captions=1)
    >>> captions.write(torch.tensor([[0, 1], [1, 0]]), np.array([5, 7]))
    [['a red hat'], ['ball']]
    """

    def __init__(
        self,
        attributes: dict[str, list[str]],
        templates: list[str],
        captions: int = 2,
        prompt: str = "{}",
        centred: bool = False,
    ) -> None:
        for name, phrases in attributes.items():
            if len(phrases) < 2 or len(set(phrases)) < len(phrases):
                raise ValueError(
                    f"attributes: {name}: {', '.join(phrases) or 'no phrases'}: two or more, all different"
                )
        for template in templates:
            fields = _FIELD.findall(template)
            for field in (field for field in fields if field not in attributes):
                raise ValueError(f"templates: {template!r}: no attribute {field!r}{hint(field, attributes)}")
            require_value(fields, f"templates: {template!r}: no attribute in braces; known: {', '.join(attributes)}")
        if not 1 <= captions <= len(templates):
            raise ValueError(f"captions {captions}: of {len(templates)} templates; at least 1, and each of another one")
        self.attributes, self.templates = dict(attributes), list(templates)
        self.captions, self.prompt, self.centred = captions, prompt, centred

    @property
    def prompts(self) -> list[str]:
        """Return the texts that the model reads: all phrases of all attributes, in this order."""
        return [self.prompt.replace("{}", phrase) for phrases in self.attributes.values() for phrase in phrases]

    def choose(self, z_ND: Tensor, z_PD: Tensor) -> Tensor:
        """Choose each attribute's phrase, int64 ``[N, A]``; ``z_PD``: embeddings of :attr:`prompts`."""
        parts = z_PD.split([len(phrases) for phrases in self.attributes.values()])
        return torch.stack([best_phrases(z_ND, z_pD, self.centred) for z_pD in parts], dim=1)

    def write(self, choice_NA: Tensor, key_N: np.ndarray) -> list[list[str]]:
        """Write the captions of each image, as a pure function of its phrases and its key."""
        order_NK = uniform_NK(key_N, [f"pseudo/template/{k}" for k in range(len(self.templates))]).argsort(dim=1)
        each = zip(choice_NA.tolist(), order_NK[:, : self.captions].tolist(), strict=True)
        return [[self._fill(template, choice) for template in templates] for choice, templates in each]

    def _fill(self, template: int, choice: Sequence[int]) -> str:
        chosen = {name: p[n] for (name, p), n in zip(self.attributes.items(), choice, strict=True)}
        return _FIELD.sub(lambda field: chosen[field[1]], self.templates[template])
