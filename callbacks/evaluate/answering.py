"""What is answered: how often right, how often without the picture, and some of it to look at.

Letters: B rows of a batch, M tokens said.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from descant.callbacks.evaluate.accuracy import Means
from descant.callbacks.evaluate.subsets import ForwardEvaluator
from descant.callbacks.plots.images import (
    FAINT,
    GAP,
    GREEN,
    GREY,
    INK,
    PAPER,
    RED,
    TEXT,
    TITLE,
    _filter,
    _font,
    _wrapped,
    keep_picture,
    run_folder,
)
from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such as nearest
from descant.modules.core.objective import Term
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import Generates
from descant.modules.core.rng import mix_N
from descant.modules.core.sham import Sham
from descant.modules.language import Sampling
from descant.modules.language.judges import spoken

SIDE, ASKED, SAID = 96, 400, 180  # pixels of a picture, and of the columns of words


@runtime_checkable
class Spells(Protocol):
    """Data of dialogues: ``spell(ids)`` writes tokens out; an answer begins behind ``answer_token``. Where it has
    ``is_right(said, right)``, that judges; else both have to be the same tokens."""

    answer_token: int

    def spell(self, ids: list[int]) -> str: ...


class ShownImages(NamedTuple):
    """One row of the table."""

    order: int
    picture: np.ndarray | None
    asked: str
    right: str
    said: str
    good: bool


class Answering(ForwardEvaluator):
    """Answers to the questions of each evaluation set, said token by token, and judged whole:

        {set}/answered            share that is right to the last token, and nothing more
        {set}/answered/{class}    of each class of the target ``by``
        {set}/answered_other      with the picture of another row of the batch in place of the own one
        {set}/answered_blind      without the picture
        {set}/answered_drawn      of answers that are drawn by ``sampling``, where it is given: what reinforcement earns

    and a table of some of them with their pictures, ``pictures/{set}-answers``, for every TensorBoard logger and in the
    run's folder. A model that looks answers far more than with another picture or none: what is left there it knows
    from the words alone.

    Args:
        new: most tokens of an answer.
        by: a target whose classes are counted apart, or none.
        sampling: how answers are drawn beside the likeliest; none are where not given.
        controls: ask again with another picture, and with none, where there are pictures.
        table: rows of the table, the same in every evaluation; 0 draws none.
        sets, limit, every, validate: as of other judges.

    Raises:
        ValueError: for no token; at setup, for a recipe that answers nothing or data that cannot be spelled; in an
            evaluation, for a target that the data has not.
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def __init__(
        self,
        new: int = 16,
        by: str | None = None,
        sampling: Sampling | None = None,
        controls: bool = True,
        table: int = 8,
        sets: list[str] | None = None,
        limit: int | None = None,
        every: int = 1,
        validate: bool = False,
    ) -> None:
        super().__init__(sets, limit, every, validate)
        require_objects(self, sampling=(sampling, Sampling))
        if new < 1 or table < 0:
            raise ValueError(f"Answering: new {new} and table {table}: 1 and 0 are the least")
        self.new, self.by, self.sampling, self.controls, self.table = new, by, sampling, controls, table
        self._means = Means()
        self._shown: dict[str, list[ShownImages]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, Generates):
            raise ValueError(f"Answering needs a recipe that answers, such as Chat, not {type(pl_module).__name__}")
        if not isinstance(data, Spells):
            raise ValueError(f"Answering needs data of dialogues, such as Questions; {type(data).__name__} has none")

    def _forget(self) -> None:
        super()._forget()
        self._means, self._shown = Means(), {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        here_B = keep_B & batch.present["text"]
        right_BA = batch.targets["answer"]

        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        is_right: Callable[[list[int], list[int]], bool] = getattr(data, "is_right", operator.eq)

        def good(view: Batch, sampling: Sampling | None = None) -> tuple[Tensor, Tensor]:
            assert isinstance(pl_module, Generates)
            how: Any = {} if sampling is None else {"sampling": sampling}
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                answer_ids_BM = pl_module.generate(view, new=self.new, **how)  # type: ignore[call-arg]
            both = zip(answer_ids_BM.tolist(), right_BA.tolist(), strict=True)
            found = [is_right(spoken(said), spoken(right)) for said, right in both]
            return answer_ids_BM, torch.tensor(found, device=batch.device)

        answer_ids_BM, good_B = good(batch)
        self._count(f"{name}/answered", good_B, here_B)
        if self.by is not None:
            classes = getattr(data, "classes", {})
            if self.by not in batch.targets or self.by not in classes:
                raise ValueError(f"Answering: by {self.by!r}: {nearest(self.by, classes)}")
            for k, what in enumerate(classes[self.by]):
                self._count(f"{name}/answered/{what}", good_B, here_B & (batch.targets[self.by] == k))
        if self.sampling is not None:
            self._count(f"{name}/answered_drawn", good(batch, self.sampling)[1], here_B)
        if self.controls and "image" in batch.present:
            other = Sham.permute(batch.inputs["image"], batch.draw, batch.present["image"])
            exchanged = replace(batch, inputs={**batch.inputs, "image": other})
            self._count(f"{name}/answered_other", good(exchanged)[1], here_B)
            self._count(f"{name}/answered_blind", good(batch.only("text"))[1], here_B)
        if self.table and trainer.is_global_zero:
            self._keep(trainer, batch, answer_ids_BM, good_B, here_B, name)

    def _count(self, key: str, good_B: Tensor, valid_B: Tensor) -> None:
        self._means.add(key, Term(good_B.float(), valid=valid_B))

    def _keep(
        self, trainer: L.Trainer, batch: Batch, answer_ids_BM: Tensor, good_B: Tensor, here_B: Tensor, name: str
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        order_B = mix_N(batch.index, "answers")
        rows = [n for n in here_B.nonzero().flatten().tolist()]
        for n in sorted(rows, key=lambda n: int(order_B[n]))[: self.table]:
            ids = batch.inputs["text"][n].tolist()
            asked = ids[: ids.index(data.answer_token)] if data.answer_token in ids else ids
            seen = "image" in batch.present and bool(batch.present["image"][n])
            picture = _pixels(batch.inputs["image"][n]) if seen else None
            words: Callable[[list[int]], str] = data.spell
            right, said = words(spoken(batch.targets["answer"][n].tolist())), words(spoken(answer_ids_BM[n].tolist()))
            self._shown.setdefault(name, []).append(
                ShownImages(int(order_B[n]), picture, words(asked), right, said, bool(good_B[n]))
            )

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        folder = run_folder(trainer)  # asks all ranks, so it stands before the ways part
        found = self._means.found()
        for name, rows in self._shown.items():
            if not trainer.sanity_checking:
                first = sorted(rows, key=lambda row: row.order)[: self.table]
                image = table(first, f"{name}: answers, step {trainer.global_step}")
                keep_picture(trainer, folder, image, f"{name}-answers", f"pictures/{name}-answers")
        return found


def _pixels(x: Tensor) -> np.ndarray:
    """uint8 ``[H, W, 3]`` of a picture ``[C, H, W]`` from -1 to 1; of several the first."""
    x = x[0] if x.ndim == 4 else x
    return ((x[:3].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def table(rows: list[ShownImages], title: str) -> Image.Image:
    """Picture, question, what is right and what was said, a row each: green where it is right, else red.

    >>> table([ShownImages(0, None, "what colour is it?", "red", "green", False)], "val: answers").size
    (916, 178)
    """
    left = [GAP, 2 * GAP + SIDE, 3 * GAP + SIDE + ASKED, 4 * GAP + SIDE + ASKED + SAID]
    top, tall = 3 * GAP + TITLE + TEXT, SIDE + GAP
    image = Image.new("RGB", (left[3] + SAID + GAP, top + tall * len(rows)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, _font(TITLE, title))
    for x, head in zip(left[1:], ("asked", "right", "said"), strict=True):
        draw.text((x, top - GAP // 2), head, FAINT, _font(TEXT, head), anchor="ls")
    for k, row in enumerate(rows):
        y = top + k * tall
        if row.picture is None:
            draw.rectangle((GAP, y, GAP + SIDE - 1, y + SIDE - 1), outline=GREY)
        else:
            picture = Image.fromarray(row.picture)
            image.paste(picture.resize((SIDE, SIDE), _filter(picture)), (GAP, y))
        for x, text, width, ink in (
            (left[1], row.asked, ASKED, INK),
            (left[2], row.right, SAID, INK),
            (left[3], row.said or "(nothing)", SAID, GREEN if row.good else RED),
        ):
            for i, line in enumerate(_wrapped(text, TEXT, width, 5)):
                draw.text((x, y + i * (TEXT + 3)), line, ink, _font(TEXT, line))
    return image
