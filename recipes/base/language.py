"""Causal language model over words and image tokens: hidden states of answers, decisions, generation and rollouts.

Letters: B samples, P images, I tokens of an image, S tokens of a sample, W width, N answer tokens, M new tokens,
R answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.core.host import derive, host_copy, to_device
from descant.modules.core.objective import Term, count_rows_by_sample, means
from descant.modules.core.output import Decisions
from descant.modules.core.rng import mix_N
from descant.modules.language import CausalLM, Generated, Sampling, generate_some, log_probabilities
from descant.modules.language.answer_scores import answered_with
from descant.modules.language.depths import DepthRouting, depth_terms
from descant.modules.language.interleave import (
    Interleaved,
    collect_images,
    insert_images,
    interleave,
    rows_without_images,
)
from descant.modules.language.packing import PackingCounts, through
from descant.modules.language.positions import VisualSteps
from descant.modules.language.projectors import ImageProjector
from descant.modules.moe import Marks, Routing, expert_terms
from descant.modules.moe.routing import UNMARKED
from descant.modules.objectives.language import LanguageObjective, answer_log_probabilities
from descant.modules.tokenizers.text import EOS, PAD
from descant.recipes.base.recipe import Recipe


class LanguageRecipe(Recipe):
    """Base of recipes with one language model; a subclass sets the parts in its constructor."""

    #: Names of the token kinds that experts distinguish, in the order of their numbers.
    token_kinds = ("text", "image")

    lm: CausalLM
    projector: ImageProjector
    image_token: int | None
    answer_token: int
    marks: dict[str, int]
    row: int
    document_mask: bool
    prefix_sight: bool
    new: int
    visual: VisualSteps
    sampling: Sampling
    objective: LanguageObjective

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.packing = PackingCounts()  # counts training only, for PackingStatistics

    def require_data(self, data: Any) -> None:
        """Raise ValueError if the longest possible document, at the current tokens per image, does not fit in a row."""
        text, images = getattr(data, "length", None), getattr(data, "images", 0)
        tokens = self.projector.image_tokens if self.image_token is not None else None
        if text is None or tokens is None:
            return
        longest = text + images * (tokens - 1)  # the text has one token for each image
        if longest > self.row:
            of = f"an image of {tokens} tokens" if images == 1 else f"{images} images of {tokens} tokens each"
            raise ValueError(
                f"row {self.row}: documents of {type(data).__name__} have up to {longest} tokens, {of} among them; "
                f"the least row is {longest}, or data of length {text - longest + self.row}"
            )

    # from a batch to what the model reads -------------------------------------------------------------------------

    def sequence(self, batch: Batch) -> tuple[Tensor, Interleaved]:
        """Return ``h_BSW``, the embedded words with image tokens among them, and a description of each token."""
        if self.image_token is None or "image" not in batch.inputs:  # text-only data, as a stage may have
            row = rows_without_images(batch)
            return self.lm.embed(row.ids_BS), row
        pictures = collect_images(batch, self.image_token)
        with self.row_tracker.select(pictures.sample_P):
            tokens = self.towers["image"](pictures.x_P)
            seen_PIW, kept_PI = self.projector(tokens), self.projector.output_mask(tokens)
        row = interleave(batch, pictures, seen_PIW.shape[1], self.image_token, kept_PI)
        h_BSW = insert_images(self.lm.embed(row.ids_BS), seen_PIW, pictures, row)
        return h_BSW, self.visual(row, self.image_token, batch.rng_seed, self.lm.training)

    def read(self, batch: Batch, routings: list[Routing] | None = None) -> tuple[Tensor, Tensor, Interleaved]:
        """Return ``h_BSW`` before and after the language model, and what each token is; experts fill ``routings``."""
        embedded_BSW, row = self.sequence(batch)
        place_BS = None if row.position_BS is None else derive(lambda x_BS: x_BS[:, :-1], row.position_BS)
        alone = self.document_mask or not self.training or self.objective.deterministic
        counts = self.packing if self.training else None
        prefix_BS = self.prompt(row) if self.prefix_sight else None
        marks = self.marks_of(batch, row.ids_BS)
        if self.lm.experts is not None and self.lm.experts.answers != 1:
            marks = marks._replace(weight=torch.where(row.loss_mask_BS, self.lm.experts.answers, 1.0))
        rows = (self.lm, embedded_BSW, row.real_BS, self.row, place_BS, alone, counts, prefix_BS, marks, routings)
        return embedded_BSW, through(*rows), row

    def marks_of(self, batch: Batch, ids_BS: Tensor) -> Marks:
        """Return what expert routers may know of each token: its kind, its task and a key for random draws.

        The kind is 1 for image tokens and 0 for others, or depends on the id. The task is the sample's source. The key
        is derived from the sample's visit and the token's position.
        """
        if self.lm.experts is None and self.lm.visual is None:
            return UNMARKED
        image = self.image_token
        kind_BS = derive(lambda ids: torch.zeros_like(ids) if image is None else (ids == image).long(), ids_BS)
        if self.lm.visual is not None:
            kind_BS = self.lm.visual(kind_BS, derive(lambda ids: ids != PAD, ids_BS), batch.rng_seed)
        task_BS = derive(lambda source_B, ids: source_B[:, None].expand(ids.shape), batch.source, ids_BS)
        place_S = np.arange(ids_BS.shape[1], dtype=np.uint64)
        key_BS = torch.from_numpy(mix_N(host_copy(batch.rng_seed)[:, None], "token", place_S))
        return Marks(
            kind_BS if self.lm.kinds is None else self.lm.kind_of(ids_BS),
            task_BS,
            key=to_device(key_BS, ids_BS.device),
        )

    def expert_terms(self, routings: list[Routing]) -> dict[str, Term]:
        """Compute load-balancing terms of experts and losses of causal routers, in training."""
        if not self.lm.training:
            return {}
        depths = [routing for routing in routings if isinstance(routing, DepthRouting)]
        experts = [routing for routing in routings if not isinstance(routing, DepthRouting)]
        return expert_terms(self.lm.experts, experts) | depth_terms(depths)

    def prompt(self, row: Interleaved) -> Tensor:
        """Return a bool mask ``[B, S]`` of the tokens up to and including the first answer mark."""

        def up_to_answer(ids_BS: Tensor, real_BS: Tensor) -> Tensor:
            begins_BS = ids_BS == self.answer_token
            return real_BS & (begins_BS.cumsum(dim=1) == begins_BS.int())

        return derive(up_to_answer, row.ids_BS, row.real_BS)

    def hidden_before_answers(
        self, batch: Batch, routings: list[Routing] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for each learned token, what the head reads before it ``[N, W]``, its id and its sample, ``[N]``."""
        return self._before(*self.read(batch, routings)[1:])

    @staticmethod
    def _before(h_BSW: Tensor, row: Interleaved) -> tuple[Tensor, Tensor, Tensor]:
        found = host_copy(row.loss_mask_BS).nonzero(as_tuple=True)
        sample_N, at_N = (to_device(x_N, h_BSW.device) for x_N in found)
        return h_BSW[sample_N, at_N - 1], row.ids_BS[sample_N, at_N], sample_N

    # decisions and scores ------------------------------------------------------------------------------------------

    @property
    def choices(self) -> int:
        return self.lm.vocabulary

    def decide(self, batch: Batch) -> Decisions:
        """Return next-token decisions at each token of the batch's answers."""
        before_NW, _, sample_N = self.hidden_before_answers(batch)
        return self.decisions(before_NW, sample_N)

    def decisions(self, before_NW: Tensor, sample_N: Tensor) -> Decisions:
        return Decisions(lambda at: self.lm.logits(before_NW[at]), sample_N)

    def scores(self, batch: Batch) -> dict[str, Term]:
        """Return ``accuracy``, whether the whole greedy answer is correct, and ``loss``, the mean over its tokens.

        With teacher forcing: an answer is correct if each of its tokens is the most probable one after the correct
            tokens before it.
        """
        before_NW, token_N, sample_N = self.hidden_before_answers(batch)
        log_N = log_probabilities(before_NW, self.lm.head.weight, token_N)
        right_N = self.lm.logits(before_NW).argmax(dim=1) == token_N
        loss_B, valid_B = means(-log_N, sample_N, len(batch))
        share_B, _ = means(right_N.to(log_N), sample_N, len(batch))
        exact_B = (share_B > 1 - 1e-6).to(log_N)
        return {"accuracy": Term(exact_B, valid=valid_B), "loss": Term(loss_B, valid=valid_B)}

    @torch.no_grad()
    def token_experts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for each scored token, the prediction's entropy, the mean count of real experts, and the sample."""
        if self.lm.experts is None:
            raise ValueError("the language model has no experts; give it some: lm.experts")
        routings: list[Routing] = []
        _, h_BSW, row = self.read(batch, routings)
        before_NW, _, sample_N = self._before(h_BSW, row)
        sample_at, at = host_copy(row.loss_mask_BS).nonzero(as_tuple=True)
        key_BS = self.marks_of(batch, row.ids_BS).key
        assert key_BS is not None
        key_N = host_copy(key_BS)[sample_at, at - 1]
        layers = [routing for routing in routings if not isinstance(routing, DepthRouting)]
        experts_LN = torch.stack([routing.count_runs(self.lm.experts.experts, key_N) for routing in layers])
        log_p = (self.lm.logits(h_MW).log_softmax(dim=1) for h_MW in before_NW.split(1024))
        entropy_N = torch.cat([-(x_MV.exp() * x_MV).sum(dim=1) for x_MV in log_p])
        return entropy_N, experts_LN.mean(dim=0).to(entropy_N.device), sample_N

    def generate(self, batch: Batch, new: int = 8, sampling: Sampling | None = None) -> Tensor:
        """Generate answers, int64 ``[B, M]``, up to their end; greedy by default."""
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
        """Sample ``group`` consecutive answers per question, each with its own seed; none if nothing is asked."""
        h_BSW, row = self.sequence(batch)
        asked_BS, both = self.prompt(row), self.prefix_sight
        if seed_R is None:
            turn_R = torch.arange(len(batch) * group, device=batch.index.device) % group
            seed_R = batch.index.repeat_interleave(group) + (turn_R << 40)  # the first one as if alone
        how = sampling or Sampling()
        marks = self.marks_of(batch, derive(lambda ids: F.pad(ids, (0, 1)), row.ids_BS))  # new tokens are text
        return generate_some(self.lm, h_BSW, asked_BS, new, group, stop, how, seed_R, row.position_BS, both, marks)

    @torch.no_grad()
    def likelihood(self, batch: Batch, answer_ids_BM: Tensor) -> Tensor:
        """Compute ``exp(mean_t log p(said_bt))``, ``[B]``, including the end token; 0 if nothing is asked."""
        before_NW, token_N, sample_N = self.hidden_before_answers(
            answered_with(batch, answer_ids_BM, self.answer_token)
        )
        log_B, some_B = means(log_probabilities(before_NW, self.lm.head.weight, token_N), sample_N, len(batch))
        return torch.where(some_B, log_B.exp(), 0.0)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return {"scores": self.scores(batch)}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Compute features of each dialogue, from which scorers of instruction data learn (mmSSR):

            image  = mean of the image's tokens, as the model reads them
            text   = mean_t h_t,                        over all tokens t of the dialogue
            answer = mean_t (h_t * w_t, log p_t),       over the tokens of the answer

        ``h_t`` is what the head reads before token t, and ``w_t`` is the head's row for token t. Their products sum to
        the token's logit, so a linear scorer sees how well the answer fits.
        """
        embedded_BSW, h_BSW, row = self.read(batch)
        before_NW, token_N, sample_N = self._before(h_BSW, row)
        log_N = log_probabilities(before_NW, self.lm.head.weight, token_N)
        fit_NW = torch.cat([before_NW * self.lm.head.weight[token_N], log_N[:, None]], dim=1)
        total_BW = fit_NW.new_zeros(len(batch), fit_NW.shape[1]).index_add(0, sample_N, fit_NW)
        tokens_B = count_rows_by_sample(sample_N, len(batch))
        z = {"text": _mean(h_BSW, row.real_BS), "answer": total_BW / tokens_B.clamp(min=1)[:, None]}
        if self.image_token is not None:
            z["image"] = _mean(embedded_BSW, row.ids_BS == self.image_token)
        return {"index": batch.index, "present": {**batch.present, "answer": tokens_B > 0}, "z": z}

    # rollouts of GRPO ---------------------------------------------------------------------------------------------

    def roll_out(self, batch: Batch, group: int, seed_R: Tensor) -> Generated:
        """Sample ``group`` answers per question; a token that answers never contain ends one and is not part of it."""
        answers = self.roll(batch, self.new, group, self.sampling, seed_R, (EOS, PAD, *self.marks.values()))
        last_R1 = (answers.length_R - 1).clamp(min=0)[:, None]
        ended_R = answers.ended_R & (answers.length_R > 0) & (answers.token_RN.gather(1, last_R1)[:, 0] == EOS)
        length_R = answers.length_R - (answers.ended_R & ~ended_R & (answers.length_R > 0)).long()
        return answers.truncate(length_R, ended_R)

    @property
    def needs_reference(self) -> bool:
        return self.objective.needs_reference

    def reference(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities ``[N]`` of answer tokens under the reference, and each token's sample and place."""
        assert self.active_distillation is not None
        network = self.active_distillation.network.to(self.device)
        return answer_log_probabilities(network, batch, self.sampling.temperature)


def _mean(h_BSW: Tensor, keep_BS: Tensor) -> Tensor:
    """Average some tokens of each sample, ``[B, W]``; zero if it has none."""
    keep_BS1 = keep_BS[:, :, None].to(h_BSW)
    return (h_BSW * keep_BS1).sum(dim=1) / keep_BS1.sum(dim=1).clamp_min(1)
