"""Late ensemble of unimodal classifiers: the baseline that a multimodal classifier has to beat.

    p_b = sum_m w_m p_m(x_bm)        over the modalities that sample b has, w = softmax over them, equal to begin with
    loss = cross_entropy(log p_b, label)

Networks are frozen, including running statistics. With learning rate 0, the result is the plain mean of their p_m.
Letters: B samples, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.output import Output
from descant.modules.fusion.classifiers import LateFusion, SoftVoting
from descant.modules.io import saved
from descant.modules.towers import Tower, Towers
from descant.recipes.base.classifier import Classifier
from descant.recipes.base.rebuild import rebuild


class Ensemble(Classifier):
    """Soft voting of trained unimodal classifiers.

    This recipe reads the runs each time it is built (to resume, validate or load).

    Args:
        paths: modality -> a run folder, a checkpoint in one, or an export, of a classifier of that modality.
        checkpoint: in a run folder: best, last or a file in it.
    """

    def __init__(self, paths: dict[str, str], checkpoint: str = "best", **kwargs: Any) -> None:
        if not paths:
            raise ValueError("Ensemble: paths: none; such as {image: runs/image-alone}")
        members = {m: _member(m, path, checkpoint) for m, path in paths.items()}
        first = next(iter(members.values()))
        for m, member in members.items():
            if (member.target, member.classes) != (first.target, first.classes):
                raise ValueError(
                    f"{paths[m]}: {member.classes} classes of {member.target!r}, and others have {first.classes} of "
                    f"{first.target!r}"
                )
        towers = Towers(others={m: cast(Tower, member.towers[m]) for m, member in members.items()})
        super().__init__(towers, first.target, first.classes, 1, None, LateFusion(), 0.0, **kwargs)
        for part in ("pools", "heads"):
            setattr(self, part, nn.ModuleDict({m: getattr(member, part)[m] for m, member in members.items()}))
        self.fusion = SoftVoting({m: member.fusion for m, member in members.items()})
        widths = {member.width for member in members.values()}
        self.width = widths.pop() if len(widths) == 1 else 0  # 0: each has its own width
        self.requires_grad_(False)
        self.fusion.build({m: member.fusion.widths[m] for m, member in members.items()}, self.classes)
        self.train()

    def train(self, mode: bool = True) -> Ensemble:
        super().train(mode)
        for part in (self.towers, self.pools, self.heads, self.fusion):
            part.eval()
        return self

    def forward(self, batch: Batch) -> Output:
        logits_BC, label_B = self.fuse(self.latents(batch), batch.present), self.labels(batch)
        return Output({"mixture": self.term(logits_BC, label_B, self.some(batch.present), self.some(batch.step))})


def _member(m: str, path: str, checkpoint: str) -> Classifier:
    found = saved.find(Path(path), checkpoint)
    member = rebuild(found)
    if not isinstance(member, Classifier) or member.modalities != (m,):
        raise ValueError(f"{found.folder}: no classifier of {m} alone")
    return member
