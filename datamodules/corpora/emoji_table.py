"""A table of facts of each emoji drawing: numbers and categories, some of them missing by nature.

Letters: N concepts, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from descant.datamodules.corpora.stimuli import text_facts, visual_facts
from descant.datamodules.fields.table_codes import NumberCode
from descant.modules.transforms.image import BASIC_COLOURS, colour_names, over_white, reduce_rgba

#: First code points of Unicode's blocks that have emoji, each up to the next one.
BLOCKS = (0x0, 0x2190, 0x2600, 0x2700, 0x27C0, 0x1F000, 0x1F300, 0x1F600, 0x1F650, 0x1F700, 0x1F900, 0x1FA00)
#: Languages whose number of keywords is a column. Of 1,586 concepts, 38, 131 and 209 have none.
COUNTED = ("de", "hi", "vi")
_TEXT = ("letters", "words", "keywords", "letters a word")
_DRAWING = ("red", "green", "blue", "saturation", "spread", "edges", "opacity", "aspect", "bytes")
#: Columns of numbers, then columns of categories and the number of categories in each.
NUMBERS = (*_TEXT, *(f"keywords in {language}" for language in COUNTED), "valence", *_DRAWING)
CATEGORIES = {"block": len(BLOCKS), "code points": 4, "joined": 2, "colour": len(BASIC_COLOURS)}
COLUMNS = [0] * len(NUMBERS) + list(CATEGORIES.values())


def concept_facts(rows: Sequence[Mapping[str, Any]], valence_N: Tensor) -> Tensor:
    """Compute facts of concepts, ``[N, 11]``: numbers of text ``[N, 8]``, then categories ``[N, 3]`` of the code.

    The numbers are: letters, words and keywords of the English name, letters per word, number of keywords in three more
    languages (nan without any), and mean valence (nan if no word is rated). The categories are: Unicode block, code
    points (1, 2, 3, more), and whether U+200D joins them. No name, group or number of the code is among them.

    >>> row = {"hexcode": "1F600", "names": {"en": "grinning face"}, "keywords": {"en": ["happy"], "de": ["a", "b"]}}
    >>> concept_facts([row], torch.tensor([2.0]))[0, [0, 4, 5, 8]].tolist()
    [12.0, 2.0, nan, 7.0]
    """
    text_N4 = text_facts([[row["names"]["en"], *(row["keywords"]["en"] or [])] for row in rows])[:, :4]
    text_N4[:, 2] = torch.tensor([len(row["keywords"]["en"] or ()) or math.nan for row in rows])
    counts = [[len(row["keywords"].get(language) or ()) or math.nan for language in COUNTED] for row in rows]
    codes = [[int(code, 16) for code in row["hexcode"].split("-")] for row in rows]
    category = [
        [sum(first <= code[0] for first in BLOCKS) - 1, min(len(code), 4) - 1, int(0x200D in code)] for code in codes
    ]
    return torch.cat([text_N4, torch.tensor(counts), valence_N[:, None], torch.tensor(category)], dim=1)


def drawing_facts(x_N4HW: Tensor, good_N: np.ndarray, size_N: np.ndarray) -> Tensor:
    """Compute facts of drawings ``[N, 10]``: :func:`visual_facts`, log of the encoded bytes, and the commonest colour.

    The colour is that of most pixels that are not white, by :func:`colour_names` of the drawing at 16 pixels; nan if a
    drawing is missing or white.
    """
    facts_N10 = torch.full((len(x_N4HW), 10), torch.nan)
    facts_N10[good_N, :8] = visual_facts(x_N4HW[good_N])
    facts_N10[good_N, 8] = torch.from_numpy(size_N[good_N]).log().float()
    name_NHW = colour_names(over_white(reduce_rgba(x_N4HW[good_N], 16).float() / 255) * 2 - 1)
    count_NK = torch.nn.functional.one_hot(name_NHW.flatten(1), len(BASIC_COLOURS)).sum(dim=1)
    count_NK[:, list(BASIC_COLOURS).index("white")] = 0
    colour_N = count_NK.argmax(dim=1).float().masked_fill(~count_NK.any(dim=1), torch.nan)
    facts_N10[good_N, 9] = colour_N
    return facts_N10


def emoji_table(concept_N: Tensor, drawing_N: Tensor) -> Tensor:
    """Join :func:`concept_facts` and facts of drawings into the columns ``[N, C]`` of :data:`COLUMNS`, not scaled."""
    return torch.cat([concept_N[:, :8], drawing_N[:, :9], concept_N[:, 8:], drawing_N[:, 9:]], dim=1)


def standardise_by(x_NC: Tensor, training_RC: Tensor) -> Tensor:
    """Standardise the numbers in ``x_NC`` by the mean and deviation of training rows."""
    z_NC = x_NC.clone()
    for c in range(len(NUMBERS)):
        code = NumberCode.of(training_RC[:, c].double().numpy())
        z_NC[:, c] = torch.from_numpy(code(pa.chunked_array([pa.array(x_NC[:, c].numpy())]))[0])
    return z_NC
