"""Float targets of drawings and their texts, for linear readouts: visual, textual, their products, and noise.

Letters: N drawings or texts, F = 8 numbers of each, H x W pixels, C channels.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.corpora.measure import first_and_end
from descant.modules.core.rng import salt, uniform_NK
from descant.modules.transforms.image import over_white

FACTS = 8


def visual_facts(x_N4HW: Tensor) -> Tensor:
    """Compute colour and shape statistics of RGBA drawings: uint8 ``[N, 4, H, W] -> [N, 8]`` float32.

    Over white: mean red, green and blue, saturation (mean of the largest minus the smallest channel), spread of
    brightness (its standard deviation), and edges (mean of its absolute steps right and down). Of the opacity: its
    mean, and log(width / height) of the box around all that is at least half opaque. All are in 0..1 except the last.

    >>> x_N4HW = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    >>> x_N4HW[0, 0, :2] = x_N4HW[0, 3, :2] = 255  # the upper half is red
    >>> [round(v, 3) for v in visual_facts(x_N4HW)[0].tolist()]
    [1.0, 0.5, 0.5, 0.5, 0.333, 0.111, 0.5, 0.693]
    """
    facts = []
    for x in x_N4HW.split(256):  # all as floats would be gigabytes
        x_bCHW = x.float() / 255
        rgb_b3HW, alpha_bHW = over_white(x_bCHW), x_bCHW[:, 3]
        light_bHW = rgb_b3HW.mean(1)
        colour_b3 = rgb_b3HW.mean((2, 3))
        saturation_b = (rgb_b3HW.amax(1) - rgb_b3HW.amin(1)).mean((1, 2))
        spread_b = light_bHW.flatten(1).std(1, correction=0)
        steps = [light_bHW.diff(dim=dim).abs().mean((1, 2)) for dim in (1, 2)]
        opaque_bHW = alpha_bHW >= 0.5
        ends = (first_and_end(opaque_bHW.any(dim)) for dim in (1, 2))
        width_b, height_b = ((end_b - first_b).clamp(min=1).float() for first_b, end_b in ends)
        others = [saturation_b, spread_b, sum(steps) / 2, alpha_bHW.mean((1, 2)), (width_b / height_b).log()]
        facts.append(torch.cat([colour_b3, torch.stack(others, dim=1)], dim=1))
    return torch.cat(facts)


def text_facts(texts: Sequence[Sequence[str]]) -> Tensor:
    """Compute surface statistics of texts, a name and keywords each: ``-> [N, 8]`` float32.

    They are: letters and words of the name, number of keywords, mean letters per word, and four shares of the distinct
    words. Each share counts the words in a half that a hash selects.

    >>> text_facts([["grinning face", "happy"]])[0, :4].tolist()
    [12.0, 2.0, 1.0, 5.666666507720947]
    """
    facts = []
    for name, *keywords in texts:
        words = sorted(set(_words(" ".join([name, *keywords])))) or [""]
        name_words = _words(name)
        sizes = [sum(map(len, name_words)), len(name_words), len(keywords), sum(map(len, words)) / len(words)]
        bits = [sum(salt(f"fact/{word}") >> k & 1 for word in words) / len(words) for k in range(4)]
        facts.append([*sizes, *bits])
    return torch.tensor(facts, dtype=torch.float32)


def semantic_facts(texts: Sequence[Sequence[str]]) -> Tensor:
    """Compute principal components of the words of texts (name and keywords): ``-> [N, 8]`` float32, standardised.

    Latent semantic analysis: rows ``tf-idf / ||tf-idf||`` of the words that at least two texts have, centred, and
    projected on the eight directions of largest variance (Deerwester et al. 1990). Needs more than eight texts.

    >>> texts = [["cat", "animal", "pet"], ["dog", "animal", "pet"], ["car", "vehicle"], ["bus", "vehicle"]] * 3
    >>> x_NF = semantic_facts(texts)
    >>> bool(x_NF[0, 0].sign() == x_NF[1, 0].sign() == -x_NF[2, 0].sign())
    True
    """
    words = [sorted(set(_words(" ".join(text)))) for text in texts]
    count = Counter(word for text in words for word in text)
    column = {word: k for k, word in enumerate(sorted(word for word, n in count.items() if n > 1))}
    x_NV = torch.zeros(len(words), len(column), dtype=torch.float64)
    for n, text in enumerate(words):
        for word in text:
            if word in column:
                x_NV[n, column[word]] = math.log(len(words) / count[word])
    x_NV /= x_NV.norm(dim=1, keepdim=True).clamp(min=1e-12)
    x_NV -= x_NV.mean(0)
    _, vector_NN = torch.linalg.eigh(x_NV @ x_NV.T)  # ascending
    return _z(vector_NN[:, -FACTS:].flip(1)).float()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


def noise_facts(names: Sequence[str]) -> Tensor:
    """Draw normal noise as a pure function of a name: ``[N, 8]`` float32, for calibration.

    >>> bool((noise_facts(["1F600", "1F601"])[1] == noise_facts(["1F601"])[0]).all())
    True
    """
    key_N = np.array([salt(f"noise/{name}") for name in names], dtype=np.uint64)
    u_NF = uniform_NK(key_N, [f"noise{k}" for k in range(FACTS)])
    return torch.special.ndtri((u_NF + 2.0**-25).double()).float()


def product_facts(a_NF: Tensor, b_NF: Tensor, name: str = "product") -> Tensor:
    """Multiply a random combination of one and a random combination of the other: ``[N, 8]`` float32, standardised.

        y_k = z(z(a) u_k) z(z(b) v_k),   u, v normal and fixed by ``name``

    A row that is nan in ``a`` is nan in the result, and left out of all means.

    >>> product_facts(torch.randn(50, 8), torch.randn(50, 8)).std(0, correction=0).round(decimals=4).unique()
    tensor([1.])
    """
    u_FF, v_FF = (noise_facts([f"{name}/{side}/{k}" for k in range(FACTS)]) for side in "ab")
    valid_N = ~a_NF.isnan().any(dim=1)
    product_NF = torch.full_like(a_NF, float("nan"))
    product_NF[valid_N] = _z(_z(_z(a_NF[valid_N]) @ u_FF) * _z(_z(b_NF[valid_N]) @ v_FF))
    return product_NF


def _z(x_NF: Tensor) -> Tensor:
    std_F, mean_F = torch.std_mean(x_NF, dim=0, correction=0)
    return (x_NF - mean_F) / std_F.where(std_F > 0, torch.ones_like(std_F))


def valence_facts(hexcodes: Sequence[str], rated: Mapping[str, Sequence[Any]]) -> Tensor:
    """Return mean valence by hexcode, ``[N]`` float32: nan if none of a concept's words is rated.

    >>> valence_facts(["1F600", "1F699"], {"1F600": [2.0, 3]}).tolist()
    [2.0, nan]
    """
    return torch.tensor([float(rated[code][0]) if code in rated else float("nan") for code in hexcodes])
