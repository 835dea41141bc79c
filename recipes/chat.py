"""A language model that sees: pictures among the words, and answers that are learned.

Claim: a small language model, given a picture's tokens in the place of a word, answers questions about it.

    h     = embed(words),  with projector(tower(picture)) in the place of each <image>
    h     = lm(pack(h))                      documents of all lengths in few rows, none of which sees another
    loss  = mean over samples of  - mean over tokens t of the answer of  log p(t | all before it)       "answer"

Every answer counts alike, however long it is, so gradients are the same however a step is cut. The logits of a whole
vocabulary are there for a few tokens at a time. A sample without a picture has no tokens in its place; a model without
a tower only reads.
Source: Liu 2023 (LLaVA, arXiv 2304.08485); packing as in Krell 2021 (arXiv 2107.02027).
Letters: B samples, P pictures shown, I tokens of one, S of a sample, W width, N learned tokens, M new ones, R answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.host import derived, host_copy, to_device
from descant.modules.core.objective import Term, means
from descant.modules.core.rows import running
from descant.modules.core.step import Decisions
from descant.modules.engine.trainer import data_parts
from descant.modules.language import CausalLM, Generated, Sampling, generate_some, log_probabilities
from descant.modules.language.answer_scores import answered_with
from descant.modules.language.interleave import Interleaved, interleave, placed, shown, unillustrated
from descant.modules.language.packing import through
from descant.modules.language.positions import VisualSteps
from descant.modules.language.projectors import EachToken, ImageProjector
from descant.modules.tokenizers.text import EOS
from descant.modules.towers import Towers
from descant.recipes.base.recipe import Recipe


class Chat(Recipe):
    """A language model that may see, fine-tuned on dialogues.

    The data's ``text`` are ids, ``loss_mask`` the tokens to learn, and target ``answer`` what an answer has to be.

    Args:
        towers: one for pictures, ``image``, where there are some.
        lm: the language model.
        image_token: the id in whose place a picture's tokens stand.
        answer_token: the id behind which an answer begins.
        projector: from the tower's tokens to the model's; each becomes one where not given.
        visual: how far the tokens of a picture move positions on; like words where not given.
        row: tokens of a packed row; the model's length where not given.

    Raises:
        ValueError: for a tower of something else, a tower, image_token or projector without the others, or ids that the
            model has no embedding for; at setup, for ids other than the data's; in training, for a document that is
            longer than a row.
    """

    def __init__(
        self,
        *,
        towers: Towers | None = None,
        lm: CausalLM,
        image_token: int | None = None,
        answer_token: int,
        projector: ImageProjector | None = None,
        visual: VisualSteps | None = None,
        row: int | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]  # the base's own typed arguments
        towers = towers or Towers()
        if tuple(towers) not in ((), ("image",)):
            raise ValueError(f"towers: {', '.join(towers)}; a chat sees through one tower, image")
        if (image_token is None) == bool(towers) or (projector and not towers):
            raise ValueError("towers, image_token, projector: a chat that sees has the first two, one that reads none")
        marks = {"image_token": image_token, "answer_token": answer_token}
        self.marks = {name: token for name, token in marks.items() if token is not None}
        if not max(self.marks.values()) < lm.vocabulary:
            said = " and ".join(f"{name} {token}" for name, token in self.marks.items())
            least = max(self.marks.values()) + 1
            raise ValueError(f"lm.vocab {lm.vocabulary}: {said} are ids too; {least} is the least")
        self.row, self.visual = lm.length if row is None else row, visual or VisualSteps()
        self.towers, self.lm, self.modalities = towers, lm, (*towers, "text")
        if towers:
            self.projector = (projector or EachToken()).build(towers.width("image"), lm.width)
        self.image_token, self.answer_token = image_token, answer_token

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for data in data_parts(self.trainer):  # of every stage
            for name in ("image_token", "answer_token"):
                mine, its = getattr(self, name), getattr(data, name, getattr(self, name))
                if its != mine:
                    raise ValueError(f"{name} {mine}: {type(data).__name__} has {its}")

    # from a batch to what the model reads -------------------------------------------------------------------------

    def sequence(self, batch: Batch) -> tuple[Tensor, Interleaved]:
        """``h_BSW``, words and the pictures among them, and what each token is."""
        if self.image_token is None:
            row = unillustrated(batch)
            return self.lm.embed(row.ids_BS), row
        pictures = shown(batch, self.image_token)
        with running(pictures.sample_P):
            seen_PIW = self.projector(self.towers["image"](pictures.x_P))
        row = interleave(batch, pictures, seen_PIW.shape[1], self.image_token)
        h_BSW = placed(self.lm.embed(row.ids_BS), seen_PIW, pictures, row)
        return h_BSW, self.visual(row, self.image_token, batch.draw, self.lm.training)

    def answered(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of learned tokens: what the head reads before each ``[N, W]``, its id, and the sample it is of, ``[N]``."""
        h_BSW, row = self.sequence(batch)
        place_BS = None if row.position_BS is None else derived(lambda x_BS: x_BS[:, :-1], row.position_BS)
        h_BSW = through(self.lm, h_BSW, row.real_BS, self.row, place_BS)
        found = host_copy(row.loss_mask_BS).nonzero(as_tuple=True)
        sample_N, at_N = (to_device(x_N, h_BSW.device) for x_N in found)
        return h_BSW[sample_N, at_N - 1], row.ids_BS[sample_N, at_N], sample_N

    # training -----------------------------------------------------------------------------------------------------

    def disable_dropout(self) -> None:
        """Without dropout, and batch norms by their running statistics: for losses of what a model has answered, or of
        how much likelier an answer is than to another model."""
        for name, part in self.named_children():
            if name in ("towers", "projector", "lm"):
                part.eval()

    def terms(self, batch: Batch) -> dict[str, Term]:
        before_NW, token_N, sample_N = self.answered(batch)
        self.step.said = lambda: self._said(before_NW, sample_N)
        log_N = log_probabilities(before_NW, self.lm.head.weight, token_N)
        value_B, valid_B = means(-log_N, sample_N, len(batch))
        return {"answer": Term(value_B, valid=valid_B, norm=batch.step["text"].sum().clamp(min=1))}

    @property
    def choices(self) -> int:
        return self.lm.vocabulary

    def says(self, batch: Batch) -> Decisions:
        """What it says at each token of the answers that the batch has."""
        before_NW, _, sample_N = self.answered(batch)
        return self._said(before_NW, sample_N)

    def _said(self, before_NW: Tensor, sample_N: Tensor) -> Decisions:
        return Decisions(lambda at: self.lm.logits(before_NW[at]), sample_N)

    # evaluation ---------------------------------------------------------------------------------------------------

    def scores(self, batch: Batch) -> dict[str, Term]:
        """``accuracy``, whether the likeliest answer is the right one to its end, and ``loss``, of its tokens.

        Token by token the likeliest answer is right if each of its tokens is the likeliest behind the right ones.
        """
        before_NW, token_N, sample_N = self.answered(batch)
        log_N = log_probabilities(before_NW, self.lm.head.weight, token_N)
        right_N = self.lm.logits(before_NW).argmax(dim=1) == token_N
        loss_B, valid_B = means(-log_N, sample_N, len(batch))
        share_B, _ = means(right_N.to(log_N), sample_N, len(batch))
        exact_B = (share_B > 1 - 1e-6).to(log_N)
        return {"accuracy": Term(exact_B, valid=valid_B), "loss": Term(loss_B, valid=valid_B)}

    def generate(self, batch: Batch, new: int = 8, sampling: Sampling | None = None) -> Tensor:
        """Int64 ``[B, M]``: answers, to their end; by the likeliest tokens where nothing else is asked for."""
        return self.roll(batch, new, sampling=sampling or Sampling(temperature=0)).token_RN

    @torch.no_grad()
    def roll(
        self,
        batch: Batch,
        new: int = 8,
        group: int = 1,
        sampling: Sampling | None = None,
        seed_R: Tensor | None = None,
        stop: Sequence[int] = (EOS,),
    ) -> Generated:
        """``group`` answers to each question, one behind the other, drawn by seeds of their own; none where nothing is
        asked."""
        h_BSW, row = self.sequence(batch)
        begins_BS = row.ids_BS == self.answer_token
        asked_BS = row.real_BS & (begins_BS.cumsum(dim=1) == begins_BS.int())
        if seed_R is None:
            turn_R = torch.arange(len(batch) * group, device=batch.index.device) % group
            seed_R = batch.index.repeat_interleave(group) + (turn_R << 40)  # the first of each as if it were alone
        how = sampling or Sampling()
        return generate_some(self.lm, h_BSW, asked_BS, new, group, stop, how, seed_R, row.position_BS)

    @torch.no_grad()
    def likelihood(self, batch: Batch, answer_ids_BM: Tensor) -> Tensor:
        """``[B]``: ``exp(mean_t log p(said_bt))``, the end included; 0 where nothing is asked."""
        before_NW, token_N, sample_N = self.answered(answered_with(batch, answer_ids_BM, self.answer_token))
        log_B, some_B = means(log_probabilities(before_NW, self.lm.head.weight, token_N), sample_N, len(batch))
        return torch.where(some_B, log_B.exp(), 0.0)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return {"scores": self.scores(batch)}
