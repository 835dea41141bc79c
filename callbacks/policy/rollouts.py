"""Rollouts: the policy generates answers, which are rewarded and trained on (GRPO, DAPO and other policy gradients).

Letters: N questions, G answers to each, R = N G, M tokens, K rewards.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from descant.callbacks.logs.resumable_log import ResumableLog
from descant.callbacks.policy.rounds import sum_over_ranks
from descant.modules.core.capabilities import has, require
from descant.modules.core.modes import eval_mode
from descant.modules.core.objects import require_objects
from descant.modules.core.rng import global_seed, mix_N
from descant.modules.core.rollouts import RolloutData, RolloutPolicy
from descant.modules.core.sham import Sham
from descant.modules.language import Generated
from descant.modules.policy import Advantage, GroupScaled
from descant.modules.policy.rewards import Answer, Rewards
from descant.modules.training_setup.boards import Table
from descant.modules.training_setup.trainer import bank_batches, data_now, data_parts, epoch_now


class Rollouts(Callback):
    """Policy rollouts: replaces the answers of a :class:`descant.modules.core.rollouts.RolloutData` data module at
    epoch starts.

    The current model, in eval mode, generates G answers to each question; verifiers reward them; advantages are
    computed over all ranks. Questions whose answers all have equal reward (flat groups) give no signal: with
    ``resample`` they are replaced by the next questions, whole groups at a time (DAPO's dynamic sampling, Yu 2025,
    arXiv 2503.14476). Answers are part of the data module's state, so a run resumes within a rollout.

    On policy the loss is zero by construction. Logged at each rollout: ``rollouts/reward``, the weighted sum, and
    ``rollouts/reward/{name}``; ``rollouts/flat``, share of flat groups among all questions; ``rollouts/asked``,
    number of answers generated; ``rollouts/length``; ``rollouts/cut``, share of truncated answers;
    ``rollouts/entropy``, mean of -log p of the sampled tokens, an unbiased estimate of the policy's entropy.
    TensorBoard's text ``rollouts/answers`` shows some.

    Args:
        rewards: rewards of answers.
        advantage: advantage of answers; GroupScaled (GRPO) by default.
        passes: epochs on each rollout; beyond one optimizer step training is off policy.
        resample: maximum number of times that flat groups are replaced.
        flat: whether remaining flat groups ``count`` as tokens of the step, with zero advantage, or are left out.
        cut: the same for truncated answers (DAPO's overlong filtering).
        show: questions of each rollout that TensorBoard shows with all answers.
        sham: ``permute`` for the control: permutes rewards over the answers to each question.
    """

    once = True

    def __init__(
        self,
        rewards: Rewards,
        advantage: Advantage | None = None,
        passes: int = 1,
        resample: int = 0,
        flat: Literal["count", "leave"] = "leave",
        cut: Literal["count", "leave"] = "count",
        show: int = 2,
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        require_objects(self, rewards=(rewards, Rewards), advantage=(advantage, Advantage))
        if passes < 1 or resample < 0:
            raise ValueError(f"Rollouts: passes {passes} and resample {resample}: at least 1 and 0")
        self.rewards, self.advantage = rewards, advantage or GroupScaled()
        self.passes, self.resample, self.flat, self.cut, self.sham = passes, resample, flat, cut, Sham(sham)
        self.show, self.resumable_log = show, ResumableLog()
        self._shown: Table | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"told": self.resumable_log.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.resumable_log.load_state_dict(state_dict["told"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        parts = data_parts(trainer)
        rollout_data = [part for part in parts if has(part, RolloutData)]
        if not rollout_data:
            raise ValueError(f"Rollouts needs rollout data, such as QuestionRollouts, not {type(parts[-1]).__name__}")
        require(self, pl_module, RolloutPolicy)
        assert has(pl_module, RolloutPolicy)
        for part in rollout_data:
            if pl_module.new > part.answer_length:
                raise ValueError(f"new {pl_module.new}: the data holds answers of {part.answer_length} tokens")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.resumable_log.write_again(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = data_now(trainer)
        now = epoch_now(trainer) // self.passes
        if not has(data, RolloutData) or data.version >= now:
            return
        problems, sampled, r_RK, log = self._generate(trainer, pl_module, now)
        group_R = torch.arange(data.items).repeat_interleave(data.group)
        advantages = self.advantage(r_RK, self.rewards.weight_K, group_R)
        valid_R = ~advantages.flat_B if self.flat == "leave" else torch.ones_like(advantages.flat_B)
        valid_R = valid_R & sampled["ended"] if self.cut == "leave" else valid_R
        if not valid_R.any():
            rank_zero_warn(
                f"Rollouts: rollout {now}: no learning signal: all answers to each question have equal reward"
            )
        data.renew(problems, {**sampled, "advantage": advantages.advantage_B, "live": valid_R}, now)
        assert has(pl_module, RolloutPolicy)
        if pl_module.needs_reference:
            data.renew(problems, {"reference": self._reference(trainer, pl_module)}, now)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in log.items()})
        self.resumable_log.write(trainer, log, {} if self._shown is None else {"rollouts/answers": self._shown})

    def _generate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, now: int
    ) -> tuple[Any, dict[str, Tensor], Tensor, dict[str, float]]:
        """Return N problems, their answers, rewards ``[R, K]``, and metrics of all generated answers."""
        data: Any = data_now(trainer)
        N, G = data.items, data.group
        taken: list[tuple[Any, dict[str, Tensor], Tensor]] = []
        missing, spare, rollouts = N, None, list[tuple[dict[str, Tensor], Tensor]]()
        for again in range(self.resample + 1):
            problems = data.fresh(now, again)
            sampled, r_RK = self._sample(trainer, pl_module, problems, now, again)
            rollouts.append((sampled, r_RK))
            group_R = torch.arange(N).repeat_interleave(G)
            flat_N = self.advantage(r_RK, self.rewards.weight_K, group_R).flat_B.view(N, G)[:, 0]
            varied_n = (~flat_N).nonzero()[:missing, 0] if self.resample else torch.arange(N)
            taken.append(_some(problems, sampled, r_RK, varied_n, G))
            missing -= len(varied_n)
            if missing == 0:
                break
            spare = _some(problems, sampled, r_RK, flat_N.nonzero()[:missing, 0], G)
        if missing:
            assert spare is not None
            taken.append(spare)  # flat groups of the last try: always enough
        problems = reduce(lambda first, other: first.and_then(other), [p for p, _, _ in taken])
        sampled = {name: torch.cat([d[name] for _, d, _ in taken]) for name in taken[0][1]}
        r_RK = torch.cat([r for _, _, r in taken])
        return problems, sampled, r_RK, self._metrics(rollouts, G)

    def _sample(
        self, trainer: L.Trainer, pl_module: Any, problems: Any, now: int, again: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Generate answers to N problems, over all ranks: ``said`` and ``old`` ``[R, M]``, ``length``, ``ended``; and
        their rewards ``[R, K]``."""
        data: Any = data_now(trainer)
        R, M, G = data.items * data.group, data.answer_length, data.group
        sampled = {
            "said": torch.zeros(R, M, dtype=torch.long),
            "old": torch.zeros(R, M),
            "length": torch.zeros(R, dtype=torch.long),
            "ended": torch.zeros(R, dtype=torch.long),
        }
        r_RK = torch.zeros(R, len(self.rewards.names), dtype=torch.float64)
        copy_N = _copies(problems.key_N)
        key_N = np.where(copy_N > 0, mix_N(problems.key_N, "copy", copy_N), problems.key_N)
        seed_R = torch.from_numpy(mix_N(np.repeat(key_N, G), "roll", global_seed(), now, again))
        seed_R = torch.from_numpy(mix_N(seed_R.numpy(), "answer", np.arange(R, dtype=np.uint64) % G))
        self._shown = self._shown if again else None
        with eval_mode(pl_module):
            for batch in bank_batches(trainer, data.asking(problems)):
                here_B = batch.present["text"].cpu()
                row_R = (batch.index.cpu()[:, None] * G + torch.arange(G)).flatten()
                with torch.no_grad(), trainer.precision_plugin.val_step_context():
                    generated = pl_module.roll_out(batch, G, seed_R[row_R].to(pl_module.device))
                here_R = here_B.repeat_interleave(G)
                room_R = (data.length - 2 - (batch.inputs["text"] == data.answer_token).int().argmax(dim=1)).cpu()
                generated = within(Generated(*(x.cpu() for x in generated)), room_R.repeat_interleave(G))
                row_R, generated = row_R[here_R], Generated(*(x[here_R] for x in generated))
                m = generated.token_RN.shape[1]
                sampled["said"][row_R, :m], sampled["old"][row_R, :m] = generated.token_RN, generated.log_RN
                sampled["length"][row_R], sampled["ended"][row_R] = generated.length_R, generated.ended_R.long()
                entries = [data.entry(problems, n // G) for n in row_R.tolist()]
                right_RA = batch.targets["answer"][here_B].repeat_interleave(G, dim=0)
                answers, r_RK[row_R] = self._reward_answers(data, generated, right_RA, entries)
                if self.show and self._shown is None:
                    questions = batch.inputs["text"].cpu()[here_B][: self.show].tolist()
                    self._shown = self._table(data, questions, answers, r_RK[row_R])
        sampled = {name: sum_over_ranks(x, pl_module.device) for name, x in sampled.items()}
        sampled["ended"] = sampled["ended"].bool()
        return sampled, self.sham.within_groups(sum_over_ranks(r_RK, pl_module.device), seed_R, G)

    def _reward_answers(
        self, data: Any, generated: Generated, right_RA: Tensor, entries: list[Any]
    ) -> tuple[list[Answer], Tensor]:
        """Return these answers as text, and their rewards ``[R, K]``."""
        length_R, ended_R = generated.length_R.tolist(), generated.ended_R.tolist()
        words = [
            data.spell(token_N[: n - e])
            for token_N, n, e in zip(generated.token_RN.tolist(), length_R, ended_R, strict=True)
        ]
        references = [data.spell(right_A) for right_A in right_RA.tolist()]
        answers = [Answer(*of) for of in zip(words, references, length_R, ended_R, entries, strict=True)]
        return answers, self.rewards(answers)

    def _table(self, data: Any, questions: list[list[int]], answers: list[Answer], r_RK: Tensor) -> Table:
        """Tabulate the first questions, with all answers and rewards."""
        columns = ("question", "reference", "answer", *(f"reward {name}" for name in self.rewards.names))
        rows = []
        for r, answer in enumerate(answers[: len(questions) * data.group]):
            ids = questions[r // data.group]
            words = [data.spell(ids[: ids.index(data.answer_token)]), answer.reference, answer.text]
            rows.append((*words, *(f"{x:.3g}" for x in r_RK[r].tolist())))
        return Table(columns, rows)

    def _reference(self, trainer: L.Trainer, pl_module: Any) -> Tensor:
        """Compute ``[R, M]``: log-probabilities of the answers under the reference policy."""
        data: Any = data_now(trainer)
        log_RM = torch.zeros(data.items * data.group, data.answer_length)
        for batch in bank_batches(trainer, data.rows()):
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                log_N, sample_N, place_N = pl_module.reference(batch)
            here_N = batch.present["text"].cpu()[sample_N.cpu()]
            at_N = batch.index.cpu()[sample_N.cpu()][here_N], place_N.cpu()[here_N]
            log_RM[at_N] = log_N.float().cpu()[here_N]
        return sum_over_ranks(log_RM, pl_module.device)

    def _metrics(self, rollouts: list[tuple[dict[str, Tensor], Tensor]], G: int) -> dict[str, float]:
        r_RK = torch.cat([r for _, r in rollouts])
        length_R, ended_R, old_RM = (
            torch.cat([sampled[x] for sampled, _ in rollouts]) for x in ("length", "ended", "old")
        )
        group_R = torch.arange(len(r_RK)) // G
        advantages = self.advantage(r_RK, self.rewards.weight_K, group_R)
        by_name = zip(self.rewards.names, r_RK.nanmean(dim=0).tolist(), strict=True)
        return {
            "rollouts/reward": float(advantages.reward_B.nanmean()),
            **{f"rollouts/reward/{name}": r for name, r in by_name},
            "rollouts/flat": float(advantages.flat_B.double().mean()),
            "rollouts/asked": float(len(r_RK)),
            "rollouts/length": float(length_R.double().mean()),
            "rollouts/cut": 1 - float(ended_R.double().mean()),
            "rollouts/entropy": float(-old_RM.double().sum() / length_R.sum().clamp(min=1)),
        }


def within(generated: Generated, room_R: Tensor) -> Generated:
    """Truncate answers at the end of their row, which needs one more place for an end.

    >>> cut = within(Generated(torch.tensor([[5, 6, 7]]), torch.zeros(1, 3), torch.tensor([3]), torch.tensor([True])),
    ...              torch.tensor([1]))
    >>> cut.token_RN.tolist(), cut.length_R.tolist(), cut.ended_R.tolist()
    ([[5, 0, 0]], [1], [False])
    """
    over_R = generated.length_R - generated.ended_R.long() > room_R
    return generated.truncate(torch.where(over_R, room_R, generated.length_R), generated.ended_R & ~over_R)


def _copies(key_N: np.ndarray) -> np.ndarray:
    """Count how often each key occurred before: a problem that is asked twice gets new answers.

    >>> _copies(np.array([7, 5, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    order = key_N.argsort(kind="stable")
    _, first_N, which_N = np.unique(key_N[order], return_index=True, return_inverse=True)
    copies_N = np.empty(len(key_N), dtype=np.uint64)
    copies_N[order] = (np.arange(len(key_N)) - first_N[which_N]).astype(np.uint64)
    return copies_N


def _some(
    problems: Any, sampled: dict[str, Tensor], r_RK: Tensor, at_n: Tensor, G: int
) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Select the questions with these numbers, and all answers to them."""
    row_r = (at_n[:, None] * G + torch.arange(G)).flatten()
    return problems.where(at_n.numpy()), {name: x[row_r] for name, x in sampled.items()}, r_RK[row_r]
