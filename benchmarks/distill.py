"""The purpose of distilling a ranking: find a text's picture among a whole collection, by teacher and by student.

Letters: B samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import Row
from benchmarks.timing import ratio
from descant.modules.core.batch import Batch
from descant.modules.fusion.cross_encoder import CrossEncoder
from descant.modules.towers import ConvTower, TextTower, Towers
from descant.recipes import Contrastive, Matching

#: Time of the teacher / of the student, for one text among this number of pictures.
FASTER, PICTURES = 20.0, 1583


def ranking(pairs: int = 30, pictures: int = PICTURES) -> Iterator[Row]:
    """Time the networks of distill/emoji-teacher and distill/emoji-rank; both have encoded the pictures beforehand."""
    torch.manual_seed(0)
    teacher = Matching(
        Towers(image=ConvTower(widths=[48, 96, 192], stem=4), text=TextTower(8192, 96, depth=1, heads=4, length=24)),
        CrossEncoder(width=96, depth=2, heads=4),
    ).eval()
    student = Contrastive(
        Towers(image=ConvTower(widths=[16, 32, 64], stem=4), text=TextTower(8192, 64, depth=1, heads=4, length=24)),
        width=64,
    ).eval()
    drawn = torch.Generator().manual_seed(0)
    inputs = {
        "image": torch.rand(pictures, 3, 32, 32, generator=drawn),
        "text": torch.randint(3, 8192, (pictures, 24), generator=drawn),
    }
    seen = Batch(inputs, {m: torch.ones(pictures, dtype=torch.bool) for m in inputs})
    asked = seen.select(torch.tensor([0]))
    column, every = torch.zeros(pictures, dtype=torch.long), torch.arange(pictures)
    with torch.no_grad():
        tokens, z_BD = teacher.tokens(seen, "image"), student.embed(seen)["image"]

    @torch.no_grad()
    def by_teacher() -> None:
        teacher.cross(tokens, teacher.tokens(asked, "text"), every, column).argmax()

    @torch.no_grad()
    def by_student() -> None:
        (z_BD @ student.embed(asked.only("text"))["text"][0]).argmax()

    found = ratio(by_student, by_teacher, pairs)
    yield Row.at_least("distill/ranking", found.value, FASTER, found.interval)
