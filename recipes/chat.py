"""A language model that sees: pictures among the words, and answers that are learned.

Claim: a small language model, given a picture's tokens in the place of a word, answers questions about it.

    h     = embed(words),  with projector(tower(picture)) in the place of each <image>
    h     = lm(pack(h))                      documents of all lengths in few rows, none of which sees another
    loss  = mean over samples of  - mean over tokens t of the answer of  log p(t | all before it)       "answer"

Every answer counts alike, however long it is, so gradients are the same however a step is cut. The logits of a whole
vocabulary are there for a few tokens at a time. A sample without a picture has no tokens in its place.
Source: Liu 2023 (LLaVA, arXiv 2304.08485); packing as in Krell 2021 (arXiv 2107.02027).
Letters: B samples, P pictures shown, I tokens of one, S tokens of a sample, W width, N learned tokens, M new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from descant.modules.batch import Batch
from descant.modules.language import CausalLM, Generated, Sampling, generate, log_probabilities
from descant.modules.language.interleave import Interleaved, interleave, shown
from descant.modules.language.judges import answered_with
from descant.modules.language.packing import through
from descant.modules.language.projectors import EachToken, ImageProjector
from descant.modules.objective import Term, means
from descant.modules.rows import running
from descant.modules.step import Said
from descant.modules.text import EOS
from descant.modules.towers import Towers
from descant.recipes.base import Recipe


class Chat(Recipe):
    """A vision-language model, fine-tuned on dialogues.

    The data's ``text`` are ids, ``text_said`` the tokens to learn, and target ``answer`` what an answer has to be.

    Args:
        towers: one for pictures, ``image``.
        lm: the language model.
        image_token: the id in whose place a picture's tokens stand.
        answer_token: the id behind which an answer begins.
        projector: from the tower's tokens to the model's; each becomes one where not given.
        row: tokens of a packed row; the model's length where not given.

    Raises:
        ValueError: for a tower of something else, or ids that the model has no embedding for; at setup, for ids other
            than the data's; in training, for a document that is longer than a row.
    """

    def __init__(
        self,
        towers: Towers,
        lm: CausalLM,
        image_token: int,
        answer_token: int,
        projector: ImageProjector | None = None,
        row: int | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]  # the base's own typed arguments
        if tuple(towers) != ("image",):
            raise ValueError(f"towers: {', '.join(towers)}; a chat sees through one tower, image")
        if not max(image_token, answer_token) < lm.vocabulary:
            raise ValueError(
                f"lm.vocab {lm.vocabulary}: image_token {image_token} and answer_token {answer_token} are ids too; "
                f"{max(image_token, answer_token) + 1} is the least"
            )
        self.row = lm.length if row is None else row
        self.towers, self.lm, self.modalities = towers, lm, ("image", "text")
        self.projector = (projector or EachToken()).build(towers.width("image"), lm.width)
        self.image_token, self.answer_token = image_token, answer_token

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for name in ("image_token", "answer_token"):
            theirs = getattr(self.trainer.datamodule, name, None)  # type: ignore[attr-defined]
            if theirs is not None and theirs != getattr(self, name):
                raise ValueError(f"{name} {getattr(self, name)}: the data has {theirs}")

    # from a batch to what the model reads -------------------------------------------------------------------------

    def sequence(self, batch: Batch) -> tuple[Tensor, Interleaved]:
        """``h_BSW``, words and the pictures among them, and what each token is."""
        pictures = shown(batch, self.image_token)
        with running(pictures.sample_P):
            seen_PIW = self.projector(self.towers["image"](pictures.x_P))
        row = interleave(batch, pictures, seen_PIW.shape[1], self.image_token)
        h_BSW = self.lm.embed(row.ids_BS) + 0.0 * seen_PIW.sum().to(self.lm.embedding.weight)
        if pictures.some:
            at = pictures.sample_P[:, None].expand_as(row.at_PI), row.at_PI
            h_BSW = h_BSW.index_put(at, seen_PIW.to(h_BSW))
        return h_BSW, row

    def answered(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of learned tokens: what the head reads before each ``[N, W]``, its id, and the sample it is of, ``[N]``."""
        h_BSW, row = self.sequence(batch)
        h_BSW = through(self.lm, h_BSW, row.real_BS, self.row)
        sample_N, at_N = row.said_BS.nonzero(as_tuple=True)
        return h_BSW[sample_N, at_N - 1], row.ids_BS[sample_N, at_N], sample_N

    # training -----------------------------------------------------------------------------------------------------

    def terms(self, batch: Batch) -> dict[str, Term]:
        before_NW, token_N, sample_N = self.answered(batch)
        self.step.said = lambda: self._said(before_NW, sample_N)
        log_N = log_probabilities(before_NW, self.lm.head.weight, token_N)
        value_B, valid_B = means(-log_N, sample_N, len(batch))
        return {"answer": Term(value_B, valid=valid_B, norm=batch.step["text"].sum().clamp(min=1))}

    @property
    def choices(self) -> int:
        return self.lm.vocabulary

    def says(self, batch: Batch) -> Said:
        """What it says at each token of the answers that the batch has."""
        before_NW, _, sample_N = self.answered(batch)
        return self._said(before_NW, sample_N)

    def _said(self, before_NW: Tensor, sample_N: Tensor) -> Said:
        return Said(lambda at: self.lm.logits(before_NW[at]), sample_N)

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
        some_B = asked_BS.any(dim=1)
        R, some_R = len(h_BSW) * group, some_B.repeat_interleave(group)
        whole = h_BSW.new_zeros
        found = Generated(
            whole(R, new, dtype=torch.long), whole(R, new, dtype=torch.float32), whole(R, dtype=torch.long), ~some_R
        )
        if some_B.any():
            longest = int(asked_BS.sum(dim=1).max())
            prompt, mask = h_BSW[some_B, :longest], asked_BS[some_B, :longest]
            seed_R = batch.index.repeat_interleave(group) if seed_R is None else seed_R
            said = generate(self.lm, prompt, mask, new, group, stop, sampling, seed_R[some_R])
            for whole_R, said_R in zip(found, said, strict=True):
                whole_R[some_R] = said_R
        return found

    @torch.no_grad()
    def likelihood(self, batch: Batch, said_BM: Tensor) -> Tensor:
        """``[B]``: ``exp(mean_t log p(said_bt))``, the end included; 0 where nothing is asked."""
        before_NW, token_N, sample_N = self.answered(answered_with(batch, said_BM, self.answer_token))
        log_B, some_B = means(log_probabilities(before_NW, self.lm.head.weight, token_N), sample_N, len(batch))
        return torch.where(some_B, log_B.exp(), 0.0)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return {"scores": self.scores(batch)}
