"""Vision-language model: image tokens among words, trained by SFT, GRPO or DPO.

Claim: a small language model that reads an image's tokens in place of a word answers questions about it. A model that
already answers improves from a verifier (GRPO) or from preferences (DPO).

    h    = embed(words),  with projector(tower(image)) in place of each <image>
    h    = lm(pack(h))                      documents of all lengths in few rows, none of which attends to another
    loss = objective(h, tokens)             SFT: mean over samples of the mean over answer tokens of - log p(token)

Logits of the vocabulary are computed for a few tokens at a time. A sample without an image has no tokens in its place;
a model without a tower only reads text.
Source: Liu 2023 (LLaVA, arXiv 2304.08485); packing as in Krell 2021 (arXiv 2107.02027); objectives in
descant.modules.objectives.language.
Letters: B samples, P images, I tokens of an image, S tokens of a sample, W width, N answer tokens, M new tokens,
R answers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.output import Output
from descant.modules.language import CausalLM, Sampling
from descant.modules.language.positions import VisualSteps
from descant.modules.language.projectors import EachToken, ImageProjector
from descant.modules.objectives.language import SFT, LanguageObjective
from descant.modules.towers import Towers
from descant.modules.training_setup.trainer import data_parts
from descant.recipes.base.language import LanguageRecipe


class VisionLanguage(LanguageRecipe):
    """Language model with an optional image tower (LLaVA), for SFT, GRPO and DPO.

    In the data, ``text`` holds token ids, ``loss_mask`` marks the tokens to learn, and the target ``answer`` is the
    reference answer.

    Args:
        towers: a tower ``image``, if the data has images.
        lm: the language model.
        image_token: the id that an image's tokens replace.
        answer_token: the id after which an answer begins.
        projector: maps the tower's tokens to the model's; by default each becomes one.
        visual: how far the tokens of an image advance positions; by default like words.
        row: number of tokens in a packed row; by default the model's length.
        document_mask: whether tokens attend only within their document, with positions from its start. If false, SFT
            trains on rows as one sequence, as Open-Qwen2VL's release does (Wang 2025, arXiv 2504.00595; it masks only
            padding): documents attend to earlier ones. Log-probabilities that are compared with those of other passes
            (evaluation, GRPO, DPO) are always those of a document alone.
        prefix_sight: whether tokens up to the first answer see one another in both directions (prefix language model).
        objective: SFT by default; GRPO on sampled answers (callback Rollouts), or DPO on pairs. Its reference policy,
            if it has one, is the teacher of ``distill``, without targets.
        sampling: how answers are sampled for GRPO. new: maximum number of tokens in a sampled answer.
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
        document_mask: bool = True,
        prefix_sight: bool = False,
        objective: LanguageObjective | None = None,
        sampling: Sampling | None = None,
        new: int = 12,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if new < 1:
            raise ValueError(f"new {new}: 1 is the least")
        towers = towers or Towers()
        if tuple(towers) not in ((), ("image",)):
            raise ValueError(f"towers: {', '.join(towers)}; only one is used, image")
        if (image_token is None) == bool(towers) or (projector and not towers):
            raise ValueError(
                "towers, image_token, projector: a model that sees has the first two, one that only reads has none"
            )
        marks = {"image_token": image_token, "answer_token": answer_token}
        self.marks = {name: token for name, token in marks.items() if token is not None}
        if not max(self.marks.values()) < lm.vocabulary:
            listed = " and ".join(f"{name} {token}" for name, token in self.marks.items())
            least = max(self.marks.values()) + 1
            raise ValueError(f"lm.vocab {lm.vocabulary}: {listed} are ids too; {least} is the least")
        self.row, self.visual = lm.length if row is None else row, visual or VisualSteps()
        self.document_mask, self.prefix_sight = document_mask, prefix_sight
        if prefix_sight and not document_mask:
            raise ValueError("prefix_sight: a prefix is that of a document; document_mask true is needed")
        if not document_mask and self.row > lm.length:
            raise ValueError(
                f"document_mask false: a row of {self.row} is one sequence; lm.length {lm.length} is the most"
            )
        self.towers, self.lm, self.modalities = towers, lm, (*towers, "text")
        if towers:
            self.projector = (projector or EachToken()).build(towers.width("image"), lm.width)
        self.image_token, self.answer_token = image_token, answer_token
        self.objective, self.sampling, self.new = objective or SFT(), sampling or Sampling(), new
        self.objective.require(self)
        self.train()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for data in data_parts(self.trainer):  # of every stage
            if (least := getattr(data, "embedded_ids", 0)) > self.lm.vocabulary:
                raise ValueError(f"lm.vocab {self.lm.vocabulary}: {type(data).__name__} has {least} ids, the least")
            for name in ("image_token", "answer_token"):
                mine, its = getattr(self, name), getattr(data, name, getattr(self, name))
                if its not in (mine, None):  # a stage may be text-only
                    raise ValueError(f"{name} {mine}: {type(data).__name__} has {its}")

    # training -----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        return self.objective(self, batch)

    def train(self, mode: bool = True) -> VisionLanguage:
        super().train(mode)
        if self.objective.deterministic:
            self.disable_dropout()
        return self

    def disable_dropout(self) -> None:
        """Set all parts to eval mode: no dropout, and running statistics in batch norms."""
        for name, part in self.named_children():
            if name in ("towers", "projector", "lm"):
                part.eval()

    def record(self, name: str, value: Tensor, rows: int) -> None:
        """Log a value of the objective, if a trainer is attached."""
        if self._trainer is not None:
            self.trainer.lightning_module.log(name, value, batch_size=rows)
