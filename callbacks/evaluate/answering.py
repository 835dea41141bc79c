"""Accuracy of generated answers, with controls for the image, and a table of examples.

Letters: B rows of a batch, M generated tokens, A tokens of a reference.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Values
from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.callbacks.plots.answers import AnswerRow, answer_table
from descant.callbacks.plots.output import save_figure
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.objective import Term
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import Generates
from descant.modules.core.rng import mix_N
from descant.modules.core.sham import Sham
from descant.modules.language import Sampling
from descant.modules.language.answer_scores import tokens_before_end


@runtime_checkable
class Spells(Protocol):
    """Data of dialogues: ``spell(ids)`` detokenizes; an answer begins after ``answer_token``. An optional
    ``is_right(answer, right)`` compares answer and reference; the default is equality of tokens."""

    answer_token: int

    def spell(self, ids: list[int]) -> str: ...


class Answering(ForwardEvaluator):
    """Exact-match accuracy of answers generated for the questions of each evaluation set (VQA):

        {set}/answered            share of greedy answers that equal the reference, from the first token to the end
        {set}/answered/{class}    of each class of the target ``by``
        {set}/answered_other      control: images permuted among the rows of the batch
        {set}/answered_blind      control: without images
        {set}/answered_drawn      of answers sampled by ``sampling``, if given: the expected reward of reinforcement

    It also writes a table of examples with their images, ``pictures/{set}-answers``, to every TensorBoard logger and
    the run's folder. The controls are the accuracy of the text alone: a model that uses the image is far above them.

    Args:
        new: maximum tokens of an answer.
        by: a target whose classes are counted separately, or none.
        sampling: how the additional answers are sampled, or none.
        controls: compute ``answered_other`` and ``answered_blind``, if there are images.
        table: rows of the table, the same in every evaluation; 0 for no table.
        sets, limit, every, validate: see :class:`ForwardEvaluator`.
    """

    once = True
    needs = (Generates,)

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
        require_value(new >= 1 and table >= 0, f"Answering: new {new} and table {table}: 1 and 0 are the least")
        self.new, self.by, self.sampling, self.controls, self.table = new, by, sampling, controls, table

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, Spells):
            raise ValueError(f"Answering needs data of dialogues, such as Questions; {type(data).__name__} has none")

    def _forget(self) -> None:
        super()._forget()
        self._examples: dict[str, list[tuple[int, AnswerRow]]] = {}  # set -> order, row

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        valid_B = keep_B & batch.present["text"]
        reference_BA = batch.targets["answer"]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        is_right: Callable[[list[int], list[int]], bool] = getattr(data, "is_right", operator.eq)

        def answer(view: Batch, sampling: Sampling | None = None) -> tuple[Tensor, Tensor]:
            assert has(pl_module, Generates)
            options: Any = {} if sampling is None else {"sampling": sampling}
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                answer_ids_BM = pl_module.generate(view, new=self.new, **options)  # type: ignore[call-arg]
            pairs = zip(answer_ids_BM.tolist(), reference_BA.tolist(), strict=True)
            correct = [is_right(tokens_before_end(answer), tokens_before_end(reference)) for answer, reference in pairs]
            return answer_ids_BM, torch.tensor(correct, device=batch.device)

        def count(key: str, correct_B: Tensor, valid_B: Tensor) -> None:
            id_B = batch.content_id if trainer.testing else None
            self._means.add(f"{name}/{key}", Term(correct_B.float(), valid=valid_B), id_B)

        answer_ids_BM, correct_B = answer(batch)
        count("answered", correct_B, valid_B)
        if self.by is not None:
            classes = getattr(data, "classes", {})
            if self.by not in batch.targets or self.by not in classes:
                raise ValueError(f"Answering: by {self.by!r}: {no_such(self.by, classes)}")
            for k, label in enumerate(classes[self.by]):
                count(f"answered/{label}", correct_B, valid_B & (batch.targets[self.by] == k))
        if self.sampling is not None:
            count("answered_drawn", answer(batch, self.sampling)[1], valid_B)
        if self.controls and "image" in batch.present:
            other = Sham.permute(batch.inputs["image"], batch.rng_seed, batch.present["image"])
            exchanged = replace(batch, inputs={**batch.inputs, "image": other})
            count("answered_other", answer(exchanged)[1], valid_B)
            count("answered_blind", answer(batch.only("text"))[1], valid_B)
        if self.table and trainer.is_global_zero:
            self._add_examples(trainer, batch, answer_ids_BM, correct_B, valid_B, name)

    def _add_examples(
        self, trainer: L.Trainer, batch: Batch, answer_ids_BM: Tensor, correct_B: Tensor, valid_B: Tensor, name: str
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        order_B = mix_N(batch.index, "answers")
        for n in sorted(valid_B.nonzero().flatten().tolist(), key=lambda n: int(order_B[n]))[: self.table]:
            ids = batch.inputs["text"][n].tolist()
            question = ids[: ids.index(data.answer_token)] if data.answer_token in ids else ids
            image = None
            if "image" in batch.present and bool(batch.present["image"][n]):
                image = batch.inputs["image"][n]
                image = (image[0] if image.ndim == 4 else image).cpu()  # the first of several
            reference, answer = (
                tokens_before_end(batch.targets["answer"][n].tolist()),
                tokens_before_end(answer_ids_BM[n].tolist()),
            )
            row = AnswerRow(image, data.spell(question), data.spell(reference), data.spell(answer), bool(correct_B[n]))
            self._examples.setdefault(name, []).append((int(order_B[n]), row))

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Values:
        for name, examples in self._examples.items():
            if not trainer.sanity_checking:
                rows = [row for _, row in sorted(examples, key=lambda example: example[0])[: self.table]]
                figure = answer_table(rows, f"{name}: answers, step {trainer.global_step}")
                save_figure(trainer, figure, f"{name}-answers", f"pictures/{name}-answers")
        return super().results(trainer, pl_module)
