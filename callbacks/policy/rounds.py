"""CoMD's rounds of competitive distillation: questions that the teacher answers better are augmented and trained on.

Letters: N problems of the pool, B of a batch, M tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from descant.callbacks.logs.resumable_log import ResumableMetrics
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has, require
from descant.modules.core.errors import require_value
from descant.modules.core.modes import eval_mode
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import AnswersQuestions
from descant.modules.core.ranks import total_of_ranks
from descant.modules.core.rng import global_seed, mix_N
from descant.modules.core.rollouts import QuestionPoolData
from descant.modules.core.sham import Sham
from descant.modules.language.answer_scores import Answers, AnswerScorer, ExactMatchScorer
from descant.modules.training_setup.trainer import bank_batches, data_now, data_parts, epoch_now


class Rounds(ResumableMetrics):
    """Competitive distillation rounds (CoMD): renews the pool of a
    :class:`descant.modules.core.rollouts.QuestionPoolData` data module.

    At the first epoch the teacher answers the pool (imitation). At the first epoch of each later round teacher and
    student answer all of it, and a scorer compares them (assessment):

        gap_n = score(teacher's answer) - score(student's answer),      difficult: gap_n > tau,     easy: the rest

    A share ``hard`` of the next pool are variants of difficult problems. The rest are variants of easy ones, against
    forgetting (augmentation). The teacher answers this pool. Answers are greedy, in eval mode, split over ranks; the
    pool is equal on all ranks, and in the data module's state. Logs ``rounds/difficult`` (share), ``rounds/teacher``
    and ``rounds/student`` (mean scores) and ``rounds/version``; metrics.json also has them by round, as
    ``rounds/difficult/1``. Source: CoMD (Li 2023, arXiv 2311.08213), no code released; our reading, after Lion (Jiang
    2023, arXiv 2305.12870). The paper's judge is a language model that compares two answers, in both orders; these
    scorers rate one answer at a time.

    Args:
        epochs: epochs of a round.
        judge: scorer of answers; exact match by default.
        tau: threshold of the gap for difficult problems.
        hard: share of variants of difficult problems.
        mine: how the next problems are selected: by the ``gap``, or ``random`` ones from the training split.
        sham: ``permute`` for the control: permutes gaps over problems.
    """

    once = True

    def __init__(
        self,
        epochs: int = 4,
        judge: AnswerScorer | None = None,
        tau: float = 0.3,
        hard: float = 0.5,
        mine: Literal["gap", "random"] = "gap",
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        require_objects(self, judge=(judge, AnswerScorer))
        require_value(epochs >= 1, f"Rounds: epochs {epochs}: at least 1")
        require_value(0 <= hard <= 1, f"Rounds: hard {hard:g}: a share from 0 to 1, such as 0.5")
        self.epochs, self.judge, self.tau, self.hard, self.mine = epochs, judge or ExactMatchScorer(), tau, hard, mine
        self.sham = Sham(sham)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        parts = data_parts(trainer)
        if not any(has(part, QuestionPoolData) for part in parts):
            raise ValueError(f"Rounds needs data with a pool, such as QuestionPool, not {type(parts[-1]).__name__}")
        require(self, pl_module, AnswersQuestions)
        if stage == "fit" and getattr(pl_module, "distill", None) is None:
            raise ValueError("Rounds needs a teacher: model.distill with a TeacherRun of a Chat")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = data_now(trainer)
        if not has(data, QuestionPoolData):
            return
        teacher = cast(nn.Module, pl_module.distill.network).to(pl_module.device)  # type: ignore[union-attr]
        require("Rounds: the teacher", teacher, AnswersQuestions)
        now = epoch_now(trainer) // self.epochs
        if data.version >= now:
            return
        problems, log = data.pool, {"rounds/version": float(now)}
        if data.version >= 0:
            t_N = self.scores(trainer, pl_module, teacher, teacher)
            s_N = self.scores(trainer, pl_module, pl_module, teacher)
            key_N = torch.from_numpy(np.asarray(problems.key_N))
            gap_N = self.sham.everywhere(t_N - s_N, key_N)
            shares = {"difficult": (gap_N > self.tau).float(), "teacher": t_N, "student": s_N}
            for name, x_N in shares.items():
                log |= {f"rounds/{name}": float(x_N.mean()), f"rounds/{name}/{now}": float(x_N.mean())}
            if self.mine == "random":
                problems = data.fresh(now)
            else:
                problems = data.variants(self.choose_problems(gap_N > self.tau, key_N, now), now)
        answer_ids_NM = self.answers(trainer, pl_module, teacher, problems)
        data.renew(problems, answer_ids_NM, now)
        self.resumable_log.write(trainer, {k: v for k, v in log.items() if k.count("/") == 1})
        self.history |= log
        self.update_metrics(trainer)

    def choose_problems(self, difficult_N: Tensor, key_N: Tensor, round: int) -> Tensor:
        """Return indices of N problems of the pool: difficult ones, repeated until they are enough, then easy ones."""
        turn_N = torch.from_numpy(mix_N(key_N, "rounds", global_seed(), round))
        order_N = turn_N.argsort(stable=True)
        hard_N, easy_N = (order_N[mask[order_N]] for mask in (difficult_N, ~difficult_N))
        N = len(key_N)
        want = int(self.hard * N + 0.5)
        if want and not len(hard_N):
            rank_zero_warn(f"Rounds: round {round}: no problem is difficult: only easy ones are augmented")
        want = want if len(hard_N) else 0
        want = want if len(easy_N) else N
        return torch.cat([cycle_rows(hard_N, want), cycle_rows(easy_N, N - want)])

    def scores(self, trainer: L.Trainer, pl_module: L.LightningModule, network: Any, teacher: nn.Module) -> Tensor:
        """Compute ``[N]``: scores of a network's answers to the pool."""
        pool = cast(QuestionPoolData, data_now(trainer)).pool
        scores = (
            (batch, self.judge(Answers(batch, answer_ids_BM, batch.targets["answer"], teacher)))
            for batch, answer_ids_BM in self._answers(trainer, pl_module, network, pool)
        )
        return _gather_by_index(torch.zeros(len(pool)), scores, pl_module.device)

    def answers(self, trainer: L.Trainer, pl_module: L.LightningModule, network: Any, problems: Any) -> Tensor:
        """Generate ``[N, M]``: answers of a network to some problems."""
        length = cast(QuestionPoolData, data_now(trainer)).answer_length
        answer_ids_NM = torch.zeros(len(problems), length, dtype=torch.long)
        return _gather_by_index(answer_ids_NM, self._answers(trainer, pl_module, network, problems), pl_module.device)

    def _answers(
        self, trainer: L.Trainer, pl_module: L.LightningModule, network: Any, problems: Any
    ) -> Iterator[tuple[Batch, Tensor]]:
        data = cast(QuestionPoolData, data_now(trainer))
        with eval_mode(network):
            for batch in bank_batches(trainer, data.asking(problems)):
                with torch.no_grad(), trainer.precision_plugin.val_step_context():
                    yield batch, network.generate(batch, new=data.answer_length)


def _gather_by_index(x_N: Tensor, by_batch: Iterable[tuple[Batch, Tensor]], device: torch.device) -> Tensor:
    """Fill in the rows of batches by their index, over all ranks."""
    for batch, x_B in by_batch:
        here_B = batch.present["text"].cpu()
        x_N[batch.index.cpu()[here_B]] = x_B.cpu()[here_B]
    return sum_over_ranks(x_N, device)


def cycle_rows(x_N: Tensor, n: int) -> Tensor:
    """Return the first n of x, x, x, ...

    >>> cycle_rows(torch.tensor([4, 7]), 5).tolist()
    [4, 7, 4, 7, 4]
    """
    return x_N.repeat(-(-n // max(len(x_N), 1)))[:n]


def sum_over_ranks(x: Tensor, device: torch.device) -> Tensor:
    """Sum over ranks, each of which filled a different part of zeros."""
    return total_of_ranks(x.to(device)).cpu()
