"""The model answers questions itself, and learns of how good its answers were (GRPO and its kin).

Letters: N questions, G answers to each, R = N G, M tokens, K rewards.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from descant.callbacks.policy.rounds import added
from descant.callbacks.run.resumable_log import ResumableLog
from descant.modules.core.capabilities import has
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import RolloutData, RolloutPolicy
from descant.modules.core.rng import global_seed, mix_N
from descant.modules.core.sham import Sham
from descant.modules.engine.trainer import bank_batches, data_now, data_parts, epoch_now
from descant.modules.language import Generated
from descant.modules.policy import Advantage, GroupScaled
from descant.modules.policy.rewards import Answer, Rewards


class Rollouts(Callback):
    """Renews the answers of a :class:`descant.modules.core.protocols.RolloutData` data module at the beginning of
    epochs.

    G answers are drawn to each question by the model as it is, in eval mode; verifiers reward them; advantages are of
    all answers of all ranks together. A question whose answers were all as good as each other teaches nothing: with
    ``resample`` the next questions are asked in its place, whole groups at a time (DAPO's dynamic sampling, Yu 2025,
    arXiv 2503.14476). Answers are in the data module's state, so a run goes on in the middle of them.

    The loss of such a run says little: on policy its value is zero by construction. Logged at each renewal instead:
    ``rollouts/reward``, the weighted sum, and ``rollouts/reward/{name}``; ``rollouts/flat``, the share of questions
    that teach nothing, of all that were asked; ``rollouts/asked``, how many answers were drawn; ``rollouts/length``;
    ``rollouts/cut``, the share that did not come to an end; ``rollouts/entropy``, the mean of -log p of the tokens that
    were drawn, an estimate of the policy's entropy without bias. TensorBoard's text ``rollouts/answers`` shows some.

    Args:
        rewards: what an answer earns.
        advantage: how much better than others that is; GroupScaled where not given.
        passes: epochs that a rollout is trained on; beyond one optimizer step it is off policy.
        resample: how often at most flat groups are asked anew.
        flat: whether flat groups that are left ``count`` as tokens of the step, at no advantage, or are left out.
        cut: the same of answers that were cut off at the length (DAPO's overlong filtering).
        show: questions of each rollout that TensorBoard shows with all answers.
        sham: ``permute`` for the control: answers have each other's rewards.

    Raises:
        ValueError: for counts below 1, or below 0 to resample; at setup, for data without rollouts, or a recipe that
            draws no answers, or more tokens of them than the data holds.
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
            raise ValueError(f"Rollouts: passes {passes} and resample {resample}: 1 and 0 are the least")
        self.rewards, self.advantage = rewards, advantage or GroupScaled()
        self.passes, self.resample, self.flat, self.cut, self.sham = passes, resample, flat, cut, Sham(sham)
        self.show, self.told = show, ResumableLog()
        self._shown: list[str] = []  # a table's lines

    def state_dict(self) -> dict[str, Any]:
        return {"told": self.told.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.told.load_state_dict(state_dict["told"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        parts = data_parts(trainer)
        rolled = [part for part in parts if has(part, RolloutData)]
        if not rolled:
            raise ValueError(
                f"Rollouts needs data of answers, such as QuestionRollouts, not {type(parts[-1]).__name__}"
            )
        if not has(pl_module, RolloutPolicy):
            raise ValueError(
                f"Rollouts needs a recipe that draws answers, such as Reinforced, not {type(pl_module).__name__}"
            )
        for part in rolled:
            if pl_module.new > part.answer_length:
                raise ValueError(f"new {pl_module.new}: the data holds answers of {part.answer_length} tokens")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.told.again(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = data_now(trainer)
        now = epoch_now(trainer) // self.passes
        if not has(data, RolloutData) or data.version >= now:
            return
        problems, drawn, r_RK, log = self._asked(trainer, pl_module, now)
        group_R = torch.arange(data.items).repeat_interleave(data.group)
        judged = self.advantage(r_RK, self.rewards.weight_K, group_R)
        live_R = ~judged.flat_B if self.flat == "leave" else torch.ones_like(judged.flat_B)
        live_R = live_R & drawn["ended"] if self.cut == "leave" else live_R
        if not live_R.any():
            rank_zero_warn(f"Rollouts: rollout {now}: all answers to each question were as good: nothing is learned")
        data.renew(problems, {**drawn, "advantage": judged.advantage_B, "live": live_R}, now)
        assert has(pl_module, RolloutPolicy)
        if pl_module.needs_reference:
            data.renew(problems, {"reference": self._reference(trainer, pl_module)}, now)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in log.items()})
        self.told.say(trainer, log, {"rollouts/answers": "\n".join(self._shown)} if self._shown else {})

    # asking -----------------------------------------------------------------------------------------------------------

    def _asked(
        self, trainer: L.Trainer, pl_module: L.LightningModule, now: int
    ) -> tuple[Any, dict[str, Tensor], Tensor, dict[str, float]]:
        """N problems, what was drawn to them, and earned ``[R, K]``; and what to log of all that was asked."""
        data: Any = data_now(trainer)
        N, G = data.items, data.group
        taken: list[tuple[Any, dict[str, Tensor], Tensor]] = []
        left, spare, every = N, None, list[tuple[dict[str, Tensor], Tensor]]()
        for again in range(self.resample + 1):
            problems = data.fresh(now, again)
            drawn, r_RK = self._drawn(trainer, pl_module, problems, now, again)
            every.append((drawn, r_RK))
            group_R = torch.arange(N).repeat_interleave(G)
            flat_N = self.advantage(r_RK, self.rewards.weight_K, group_R).flat_B.view(N, G)[:, 0]
            good_n = (~flat_N).nonzero()[:left, 0] if self.resample else torch.arange(N)
            taken.append(_some(problems, drawn, r_RK, good_n, G))
            left -= len(good_n)
            if left == 0:
                break
            spare = _some(problems, drawn, r_RK, flat_N.nonzero()[:left, 0], G)
        if left:
            assert spare is not None
            taken.append(spare)  # there are always as many: those of the last try that were not good
        problems = _joined([p for p, _, _ in taken])
        drawn = {name: torch.cat([d[name] for _, d, _ in taken]) for name in taken[0][1]}
        r_RK = torch.cat([r for _, _, r in taken])
        return problems, drawn, r_RK, self._told(every, N, G)

    def _drawn(
        self, trainer: L.Trainer, pl_module: Any, problems: Any, now: int, again: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the model draws to N problems, of all ranks: ``said`` and ``old`` ``[R, M]``, ``length``, ``ended``; and
        rewards ``[R, K]``."""
        data: Any = data_now(trainer)
        R, M, G = data.items * data.group, data.answer_length, data.group
        drawn = {
            "said": torch.zeros(R, M, dtype=torch.long),
            "old": torch.zeros(R, M),
            "length": torch.zeros(R, dtype=torch.long),
            "ended": torch.zeros(R, dtype=torch.long),
        }
        r_RK = torch.zeros(R, len(self.rewards.names), dtype=torch.float64)
        copy_N = _copies(problems.key_N)
        key_N = np.where(copy_N > 0, mix_N(problems.key_N, "copy", copy_N), problems.key_N)
        turn_R = torch.from_numpy(mix_N(np.repeat(key_N, G), "roll", global_seed(), now, again))
        turn_R = torch.from_numpy(mix_N(turn_R.numpy(), "answer", np.arange(R, dtype=np.uint64) % G))
        training = pl_module.training
        pl_module.eval()
        self._shown = self._shown if again else []
        try:
            for batch in bank_batches(trainer, data.asking(problems)):
                here_B = batch.present["text"].cpu()
                row_R = (batch.index.cpu()[:, None] * G + torch.arange(G)).flatten()
                with torch.no_grad(), trainer.precision_plugin.val_step_context():
                    said = pl_module.roll_out(batch, G, turn_R[row_R].to(pl_module.device))
                here_R = here_B.repeat_interleave(G)
                room_R = (data.length - 2 - (batch.inputs["text"] == data.answer_token).int().argmax(dim=1)).cpu()
                said = within(Generated(*(x.cpu() for x in said)), room_R.repeat_interleave(G))
                row_R, said = row_R[here_R], Generated(*(x[here_R] for x in said))
                m = said.token_RN.shape[1]
                drawn["said"][row_R, :m], drawn["old"][row_R, :m] = said.token_RN, said.log_RN
                drawn["length"][row_R], drawn["ended"][row_R] = said.length_R, said.ended_R.long()
                entries = [data.entry(problems, n // G) for n in row_R.tolist()]
                right_RA = batch.targets["answer"][here_B].repeat_interleave(G, dim=0)
                answers, r_RK[row_R] = self._earned(data, said, right_RA, entries)
                if self.show and not self._shown:
                    asked = batch.inputs["text"].cpu()[here_B][: self.show].tolist()
                    self._shown = self._table(data, asked, answers, r_RK[row_R])
        finally:
            pl_module.train(training)
        drawn = {name: added(x, pl_module.device) for name, x in drawn.items()}
        drawn["ended"] = drawn["ended"].bool()
        return drawn, self.sham.everywhere(added(r_RK, pl_module.device), turn_R)

    def _earned(self, data: Any, said: Generated, right_RA: Tensor, entries: list[Any]) -> tuple[list[Answer], Tensor]:
        """These answers, spelled out, and what they earn, ``[R, K]``."""
        length_R, ended_R = said.length_R.tolist(), said.ended_R.tolist()
        words = [
            data.spell(said_N[: n - e]) for said_N, n, e in zip(said.token_RN.tolist(), length_R, ended_R, strict=True)
        ]
        right = [data.spell(right_A) for right_A in right_RA.tolist()]
        answers = [Answer(*of) for of in zip(words, right, length_R, ended_R, entries, strict=True)]
        return answers, self.rewards(answers)

    def _table(self, data: Any, asked: list[list[int]], answers: list[Answer], r_RK: Tensor) -> list[str]:
        """Lines of a table of the first questions, with all answers to each and what they earned."""
        rewards = " | ".join(f"reward {name}" for name in self.rewards.names)
        lines = [f"| asked | right | said | {rewards} |", "|---" * (3 + len(r_RK[0])) + "|"]
        for r, answer in enumerate(answers[: len(asked) * data.group]):
            ids = asked[r // data.group]
            words = [data.spell(ids[: ids.index(data.answer_token)]), answer.right, answer.said]
            lines.append("| " + " | ".join([*map(_cell, words), *(f"{x:.3g}" for x in r_RK[r].tolist())]) + " |")
        return lines

    def _reference(self, trainer: L.Trainer, pl_module: Any) -> Tensor:
        """``[R, M]``: log-probabilities of what was said, under the policy to stay near to."""
        data: Any = data_now(trainer)
        found = torch.zeros(data.items * data.group, data.answer_length)
        for batch in bank_batches(trainer, data.rows()):
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                log_N, sample_N, place_N = pl_module.reference(batch)
            here_N = batch.present["text"].cpu()[sample_N.cpu()]
            at_N = batch.index.cpu()[sample_N.cpu()][here_N], place_N.cpu()[here_N]
            found[at_N] = log_N.float().cpu()[here_N]
        return added(found, pl_module.device)

    def _told(self, every: list[tuple[dict[str, Tensor], Tensor]], N: int, G: int) -> dict[str, float]:
        r_RK = torch.cat([r for _, r in every])
        length_R, ended_R, old_RM = (torch.cat([drawn[x] for drawn, _ in every]) for x in ("length", "ended", "old"))
        group_R = torch.arange(len(r_RK)) // G
        judged = self.advantage(r_RK, self.rewards.weight_K, group_R)
        log = {
            f"rollouts/reward/{name}": r
            for name, r in zip(self.rewards.names, r_RK.nanmean(dim=0).tolist(), strict=True)
        }
        return {
            "rollouts/reward": float(judged.reward_B.nanmean()),
            **log,
            "rollouts/flat": float(judged.flat_B.double().mean()),
            "rollouts/asked": float(len(r_RK)),
            "rollouts/length": float(length_R.double().mean()),
            "rollouts/cut": 1 - float(ended_R.double().mean()),
            "rollouts/entropy": float(-old_RM.double().sum() / length_R.sum().clamp(min=1)),
        }


def within(said: Generated, room_R: Tensor) -> Generated:
    """Answers cut where their row ends, which needs one place more for an end.

    >>> cut = within(Generated(torch.tensor([[5, 6, 7]]), torch.zeros(1, 3), torch.tensor([3]), torch.tensor([True])),
    ...              torch.tensor([1]))
    >>> cut.token_RN.tolist(), cut.length_R.tolist(), cut.ended_R.tolist()
    ([[5, 0, 0]], [1], [False])
    """
    over_R = said.length_R - said.ended_R.long() > room_R
    return said.cut(torch.where(over_R, room_R, said.length_R), said.ended_R & ~over_R)


def _copies(key_N: np.ndarray) -> np.ndarray:
    """How often each key stood there before: a problem that is asked twice is to be answered anew.

    >>> _copies(np.array([7, 5, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    order = key_N.argsort(kind="stable")
    _, first_N, which_N = np.unique(key_N[order], return_index=True, return_inverse=True)
    copies_N = np.empty(len(key_N), dtype=np.uint64)
    copies_N[order] = (np.arange(len(key_N)) - first_N[which_N]).astype(np.uint64)
    return copies_N


def _cell(text: str) -> str:
    """Within a table's row."""
    return " ".join(text.replace("|", "\\|").split()) or "(nothing)"


def _some(
    problems: Any, drawn: dict[str, Tensor], r_RK: Tensor, at_n: Tensor, G: int
) -> tuple[Any, dict[str, Tensor], Tensor]:
    """The questions with these numbers, and all answers to them."""
    row_r = (at_n[:, None] * G + torch.arange(G)).flatten()
    return problems.where(at_n.numpy()), {name: x[row_r] for name, x in drawn.items()}, r_RK[row_r]


def _joined(parts: list[Any]) -> Any:
    first, *others = parts
    for other in others:
        first = first.and_then(other)
    return first
