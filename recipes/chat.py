"""A language model that sees: pictures among the words, and answers that are learned.

Claim: a small language model, given a picture's tokens in the place of a word, answers questions about it.

    h     = embed(words),  with projector(tower(picture)) in the place of each <image>
    h     = lm(pack(h))                      documents of all lengths in few rows, none of which sees another
    loss  = mean over samples of  - mean over tokens t of the answer of  log p(t | all before it)       "answer"

Every answer counts alike, however long it is, so gradients are the same however a step is cut. The logits of a whole
vocabulary are there for a few tokens at a time. A sample without a picture has no tokens in its place.
Source: Liu 2023 (LLaVA, arXiv 2304.08485); packing as in Krell 2021 (arXiv 2107.02027).
Letters: B samples, K pictures of a sample, P pictures that are shown, T words of a row, I tokens of a picture, S tokens
of a sample, W width, R packed rows, N learned tokens, M new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from descant.modules.batch import Batch
from descant.modules.language import CausalLM, Sampling, generate, log_probabilities, places
from descant.modules.language.judges import answered_with
from descant.modules.language.projectors import EachToken, ImageProjector
from descant.modules.objective import Term, means
from descant.modules.rows import running
from descant.modules.step import Said
from descant.modules.text import EOS, PAD
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

    def sequence(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``h_BSW``, the id of each token (``image_token`` for a picture's), which are learned, and which are real.

        Pictures stand where they are named, in turn: ``image`` is ``[B, C, H, W]``, or ``[B, K, C, H, W]`` of several.
        """
        ids_BT, has_B, image = batch.inputs["text"], batch.present["image"], batch.inputs["image"]
        image = image if image.ndim == 5 else image[:, None]
        named_BT = ids_BT == self.image_token
        number_BT = named_BT.cumsum(dim=1) - named_BT.int()  # of the pictures before
        few_B = named_BT.sum(dim=1) > image.shape[1]
        if few_B.any():
            named, where = int(named_BT[few_B][0].sum()), int(batch.index[few_B][0])
            raise ValueError(f"sample {where}: its prompt names {named} pictures, and it has {image.shape[1]}")
        shown_B, at_B = (named_BT & has_B[:, None]).nonzero(as_tuple=True)
        # where nothing is shown, one picture of zeros, so that every rank reaches the same parameters
        some = len(shown_B) > 0
        row_P = shown_B if some else torch.zeros_like(ids_BT[:1, 0])
        x = image[row_P, number_BT[shown_B, at_B] if some else 0]
        with running(row_P):
            seen_PIW = self.projector(self.towers["image"](x if some else torch.zeros_like(x)))
        (B, T), cells = ids_BT.shape, seen_PIW.shape[1]
        # each word moves to the right of the pictures that stand before it; one that is not there takes no room
        room_B = torch.where(has_B, cells - 1, -1)
        place_BT = torch.arange(T, device=ids_BT.device) + number_BT * room_B[:, None]
        S = T + (cells - 1) * max(int(named_BT.sum(dim=1).max()), 1)
        rows_BT = torch.arange(B, device=ids_BT.device)[:, None].expand(B, T)
        ids_BS = torch.full((B, S), PAD, device=ids_BT.device, dtype=torch.long)
        said_BS = torch.zeros(B, S, device=ids_BT.device, dtype=torch.bool)
        words_BT = ~named_BT
        ids_BS[rows_BT[words_BT], place_BT[words_BT]] = ids_BT[words_BT]
        said_BS[rows_BT[words_BT], place_BT[words_BT]] = batch.inputs["text_said"][words_BT]
        at_PI = place_BT[shown_B, at_B][:, None] + torch.arange(cells, device=ids_BT.device)
        ids_BS[shown_B[:, None], at_PI] = self.image_token
        h_BSW = self.lm.embed(ids_BS)
        if some:
            h_BSW = h_BSW.index_put((shown_B[:, None].expand_as(at_PI), at_PI), seen_PIW.to(h_BSW))
        h_BSW = h_BSW + 0.0 * seen_PIW.sum().to(h_BSW)
        real_BS = (ids_BS != PAD) & batch.present["text"][:, None]
        return h_BSW, ids_BS, said_BS & real_BS, real_BS

    def answered(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of learned tokens: what the head reads before each ``[N, W]``, its id, and the sample it is of, ``[N]``."""
        h_BSW, ids_BS, said_BS, real_BS = self.sequence(batch)
        length_B = real_BS.sum(dim=1)
        some_B = (length_B > 0).nonzero().flatten()
        plan = places(length_B[some_B].tolist(), self.row)
        place_B3 = torch.zeros(len(h_BSW), 3, dtype=torch.long, device=h_BSW.device)
        place_B3[some_B] = torch.stack(plan[:3], dim=1).to(h_BSW.device)
        row_BS, first_BS, segment_BS = place_B3[:, :, None].expand(-1, -1, ids_BS.shape[1]).unbind(dim=1)
        place_BS = first_BS + real_BS.cumsum(dim=1) - 1
        packed = h_BSW.new_zeros(max(plan.rows, 1), max(plan.width, 1), h_BSW.shape[2])
        packed = packed.index_put((row_BS[real_BS], place_BS[real_BS]), h_BSW[real_BS])
        segment = torch.zeros(packed.shape[:2], dtype=torch.long, device=packed.device)
        segment[row_BS[real_BS], place_BS[real_BS]] = segment_BS[real_BS]
        h_RSW = self.lm(packed, segment)
        return h_RSW[row_BS[said_BS], place_BS[said_BS] - 1], ids_BS[said_BS], said_BS.nonzero()[:, 0]

    # training -----------------------------------------------------------------------------------------------------

    def terms(self, batch: Batch) -> dict[str, Term]:
        before_NW, token_N, sample_N = self.answered(batch)
        self.step.said = self._said(before_NW, sample_N)
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

    @torch.no_grad()
    def generate(self, batch: Batch, new: int = 8, sampling: Sampling | None = None) -> Tensor:
        """Int64 ``[B, M]``: answers, to their end; by the likeliest tokens where nothing else is asked for."""
        h_BSW, ids_BS, _, real_BS = self.sequence(batch)
        asked_BS = real_BS & ((ids_BS == self.answer_token).cumsum(dim=1) - (ids_BS == self.answer_token).int() == 0)
        found = torch.zeros(len(ids_BS), new, dtype=torch.long, device=ids_BS.device)
        some_B = asked_BS.any(dim=1)
        if some_B.any():
            longest = int(asked_BS.sum(dim=1).max())
            sampling = sampling or Sampling(temperature=0)
            seeds = batch.index[some_B]
            made = generate(
                self.lm, h_BSW[some_B, :longest], asked_BS[some_B, :longest], new, 1, [EOS], sampling, seeds
            )
            found[some_B] = made.token_RN
        return found

    @torch.no_grad()
    def likelihood(self, batch: Batch, said_BM: Tensor) -> Tensor:
        """``[B]``: ``exp(mean_t log p(said_bt))``, the end included; 0 where nothing is asked."""
        before_NW, token_N, sample_N = self.answered(answered_with(batch, said_BM, self.answer_token))
        log_B, some_B = means(log_probabilities(before_NW, self.lm.head.weight, token_N), sample_N, len(batch))
        return torch.where(some_B, log_B.exp(), 0.0)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return {"scores": self.scores(batch)}
