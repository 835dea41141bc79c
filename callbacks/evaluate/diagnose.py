"""Diagnose from a run alone whether harmonizing the terms of its loss or balancing its modalities could matter.

Letters: K terms, B rows of a batch, N rows of a set, C classes, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from descant.callbacks.evaluate.embeddings import Rows, Store
from descant.callbacks.evaluate.learning_speed import LearningSpeed
from descant.callbacks.harmonize.terms import gradients
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has, require
from descant.modules.core.errors import require_value
from descant.modules.core.host import read_together
from descant.modules.core.modes import eval_mode
from descant.modules.core.protocols import Fuses, HasObjective, MultimodalClassifier, Unimodal
from descant.modules.core.ranks import mean_of_ranks, total_of_ranks
from descant.modules.core.rng import uniform_N
from descant.modules.evaluation.diagnosis import MOST_ROWS, PROBES, ROWS, Interval, Lag, conflict, cross_fit, lag
from descant.modules.multitask.mix import gramian
from descant.modules.training_setup.boards import boards
from descant.modules.training_setup.trainer import datamodule_of, log_interval, plain_batches

#: Share of the training time that probes take if ``every`` is not given.
COST = 0.005


class Diagnose(L.Callback):
    """Diagnosis of a run: do gradients of its terms conflict, does a modality lag, and could a method change that?

        cos_kl = <g_k, g_l> / (|g_k| |g_l|),     g_k = d term_k / d shared parameters

    The cosines are probed in one of every N optimizer steps, over all micro-batches and ranks together. At the end of
    the fit, it classifies the rows of the first validation set that have all modalities and a label. It does so by each
    modality alone (its own head, or the fusion without the others), by all together, and by a readout of each
    modality's latents (:func:`~descant.modules.evaluation.diagnosis.cross_fit`). One line then reports the numbers,
    and:

        a harmonizer could matter    two terms conflict, cos < 0, in a share of at least ``conflict`` of the probes, and
                                     their mean cosine is at most -``cosine``: of all probes, or of the last half
        a balancer could matter      a modality alone is ``behind`` or more behind the most accurate one, and a readout
                                     of its latents is ``room`` or more above itself

    Whole intervals have to meet these conditions, not only the estimates; the interval of the mean cosine has to be
    below 0. That is a reason to try a method, not a proof that it gains: the diagnosis does not see what a tower would
    learn only if trained alone.

    It logs at each probe ``diagnose/cos/{term}~{term}``, ``diagnose/condition`` (of the gradients: Senushkin 2023,
    arXiv 2305.19000; sqrt of the ratio of the extreme eigenvalues of their Gram matrix), and
    ``diagnose/gap/{modality}``, the joint accuracy in the batch minus that of the modality's share of the logits.
    Metrics of the run are ``diagnose/conflict``, ``cosine``, ``alone/{modality}``, ``readout/{modality}``, ``joint``,
    ``speed/{modality}`` as in :class:`LearningSpeed`, and ``harmonize`` and ``balance``, 1 or 0. If a run has one term,
    or no classifier of several modalities, it diagnoses only the rest.

    Training is bit-identical. A probe costs K backward passes to the shared parameters, the memory of K gradients, and
    one read from an accelerator. The end costs a pass over the validation set, with a forward pass of about ``limit``
    rows.

    Args:
        every: optimizer steps between probes; by default the fewest at which K backward passes, of 2/3 step each,
            are 0.5 % of the training: 267 for two terms, 400 for three.
        conflict: share of probes. A rule that acts in less than a quarter of the steps hardly changes the path.
            Unrelated terms conflict in half of the probes, which is why the mean counts too.
        cosine: a projection changes a gradient by |cos| of its length; a twentieth is lost in the noise of a batch.
        behind: difference in accuracy; two modalities planted as equal differ by up to 0.11 (measured, 16 seeds).
        room: difference in accuracy; probes of a tower deviate by this much between seeds.
        limit: approximate number of rows, selected by their ids.
        level: level of the intervals, for all pairs of terms or for all modalities together.
    """

    once = True
    writes_at_end = True
    after = ("EMA",)  # at the end it reads the weights that are kept

    def __init__(
        self,
        every: int | None = None,
        conflict: float = 0.25,
        cosine: float = 0.05,
        behind: float = 0.15,
        room: float = 0.02,
        limit: int = 1000,
        level: float = 0.95,
    ) -> None:
        super().__init__()
        if every is not None and every < 1:
            raise ValueError(f"Diagnose: every {every}: 1 is the least")
        require_value(ROWS <= limit <= MOST_ROWS, f"Diagnose: limit {limit}: {ROWS} to {MOST_ROWS} rows")
        shares = {"conflict": conflict, "cosine": cosine, "behind": behind, "room": room, "level": level}
        for name, value in shares.items():
            require_value(0 < value < 1, f"Diagnose: {name} {value:g}: above 0 and below 1")
        self.every, self.limit, self.level = every, limit, level
        self.conflict, self.cosine, self.behind, self.room = conflict, cosine, behind, room
        self.cosines: dict[str, list[float]] = {}  # pair of terms -> cosine at each probe
        self.terms = self.skipped = 0
        self.line = ""  # the line printed at the end of the fit
        self._speed = LearningSpeed()
        self._balance = ""  # why balance is not diagnosed; empty if it is
        self._sums: list[Tensor] = []  # ``[K, ...]`` per parameter, over the micro-batches of this step so far

    def state_dict(self) -> dict[str, Any]:
        cosines = {pair: list(series) for pair, series in self.cosines.items()}
        counts = {"terms": self.terms, "skipped": self.skipped}
        return {**counts, "cosines": cosines, "speed": self._speed.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.terms, self.skipped = state_dict["terms"], state_dict["skipped"]
        self.cosines = {pair: list(series) for pair, series in state_dict["cosines"].items()}
        self._speed.load_state_dict(state_dict["speed"])

    # the hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require(self, pl_module, HasObjective)
        if not has(pl_module, MultimodalClassifier) or not has(pl_module, Fuses) or not has(pl_module, Unimodal):
            self._balance = f"{type(pl_module).__name__} lacks the protocol MultimodalClassifier"
        elif len(pl_module.modalities) < 2:
            self._balance = f"one modality, {pl_module.modalities[0]}"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = []  # drop an incomplete step, such as after a loss that was not finite

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert has(pl_module, HasObjective) and pl_module.step.objective is not None
        terms = pl_module.step.objective.terms
        if self._balance and len(terms) < 2 and self.terms < 2:
            raise ValueError(f"Diagnose: one term, {next(iter(terms))}, and {self._balance}: there is nothing to read")
        self.terms = max(self.terms, len(terms))
        if len(terms) < 2 or not self._probes(trainer):
            return
        grads = gradients(pl_module, list(pl_module.shared_parameters()))
        self._sums = [a + b for a, b in zip(self._sums, grads, strict=True)] if self._sums else grads
        if trainer.accumulate_grad_batches == 1:  # before the backward pass, which needs the memory
            self._read(trainer, pl_module, tuple(terms))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if not self._probes(trainer):
            return
        if self._sums:
            assert has(pl_module, HasObjective) and pl_module.step.objective is not None
            self._read(trainer, pl_module, tuple(pl_module.step.objective.terms))
        if not self._balance:
            self._speed.measure(pl_module)
            self._log_gaps(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        harmony, values = self._harmony(trainer)
        balance, more = self._diagnose_balance(trainer, pl_module)
        self.line, values = f"Diagnose: {harmony}; {balance}", values | more
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        if trainer.is_global_zero:
            print(self.line, flush=True)
            for board in boards(trainer.loggers):
                board.show_text("diagnose", self.line, trainer.global_step)

    # the probes ------------------------------------------------------------------------------------------------------

    def _probes(self, trainer: L.Trainer) -> bool:
        return trainer.global_step % (self.every or math.ceil(2 / 3 * max(self.terms, 1) / COST)) == 0

    def _read(self, trainer: L.Trainer, pl_module: HasObjective, names: tuple[str, ...]) -> None:
        """Log the cosines of the gradients summed so far. They are computed on the CPU, after one device read."""
        sums, self._sums = self._sums, []
        (gramian_KK,) = read_together(gramian([mean_of_ranks(g) for g in sums]))
        base_K = torch.tensor([pl_module.step.mix.get(name, 1.0) for name in names], dtype=gramian_KK.dtype)
        gramian_KK = gramian_KK * base_K[:, None] * base_K
        if not gramian_KK.isfinite().all():
            self.skipped += 1
            return
        value_K = torch.linalg.eigvalsh(gramian_KK)
        values = {"diagnose/condition": (value_K[-1] / value_K[0].clamp(min=1e-15 * value_K[-1])).sqrt()}
        norm_K = gramian_KK.diagonal().sqrt()
        for (i, a), (j, b) in combinations(enumerate(names), 2):
            if gramian_KK[i, j] != 0:  # exactly 0 if no parameter has a gradient of both
                cos = gramian_KK[i, j] / norm_K[i] / norm_K[j]
                self.cosines.setdefault(f"{a}~{b}", []).append(float(cos))
                values[f"diagnose/cos/{a}~{b}"] = cos
        if math.isfinite(log_interval(trainer)):
            log = {name: value.nan_to_num().float() for name, value in values.items()}
            cast(L.LightningModule, pl_module).log_dict(log, batch_size=1)

    def _log_gaps(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the gaps of the last micro-batch, over all ranks."""
        if pl_module.output is None or pl_module.output.fusion is None or math.isinf(log_interval(trainer)):
            return
        z, present, label_B = pl_module.output.fusion
        with eval_mode(pl_module), torch.no_grad():
            right, joint_B = _by_shares(pl_module, {m: z_BD.detach() for m, z_BD in z.items()}, present, label_B)
        judged_B = _is_complete(present, label_B)
        count_M = torch.stack([x_B & judged_B for x_B in (*right.values(), joint_B, judged_B)]).sum(dim=1).double()
        (count_M,) = read_together(total_of_ranks(count_M))
        *alone, joint, rows = count_M.tolist()
        gaps = {f"diagnose/gap/{m}": (joint - hits) / max(rows, 1.0) for m, hits in zip(right, alone, strict=True)}
        pl_module.log_dict(gaps, batch_size=1)

    # the end ---------------------------------------------------------------------------------------------------------

    def _harmony(self, trainer: L.Trainer) -> tuple[str, dict[str, float]]:
        if self.terms < 2:
            return "one term: nothing to harmonize", {}
        worst = conflict(self.cosines, self.conflict, self.cosine, self.level)
        if worst is None:
            if not self.cosines and not self.skipped and trainer.global_step:
                return "no two terms have gradients at the same shared parameters: nothing to harmonize", {}
            most = max(map(len, self.cosines.values()), default=0)
            every = max(trainer.global_step // (2 * PROBES), 1)
            instead = f"every {every} has {trainer.global_step // every}"
            return f"{most} probes of gradients, {PROBES} are the least to judge by: {instead}", {}
        probes = f"the last {worst.probes} probes" if worst.late else f"{worst.probes} probes"
        line = (
            f"{worst.pair.replace('~', ' and ')} conflict in {_percent(worst.share)} of {probes}, mean cosine "
            f"{_interval_text(worst.cosine)}: {_verdict('harmonizer', worst.matters)}"
        )
        values = {"conflict": worst.share.value, "cosine": worst.cosine.value, "harmonize": float(worst.matters)}
        return line, {f"diagnose/{name}": value for name, value in values.items()}

    def _diagnose_balance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[str, dict[str, float]]:
        if self._balance:
            return f"{self._balance}: nothing to balance", {}
        name, rows = self._rows(trainer, pl_module)
        if rows is None or len(rows) < ROWS:
            count = 0 if rows is None else len(rows)
            return f"{count} rows of {name} have all modalities and a label, {ROWS} are the least to balance by", {}
        z, label_N = {m: z_ND.cpu() for m, z_ND in rows.z.items()}, rows.targets["label"].cpu()
        right = {m: rows.targets[f"alone/{m}"].bool().cpu() for m in z}
        joint = float(rows.targets["joint"].cpu().double().mean())
        readout = {m: cross_fit(z_ND, label_N, rows.index.cpu()) for m, z_ND in z.items()}
        worst = lag(right, readout, self.behind, self.room, self.level)
        assert worst is not None
        speed = self._speed.sums
        values = {f"alone/{m}": float(x_N.double().mean()) for m, x_N in right.items()}
        values |= {f"readout/{m}": float(x_N.double().mean()) for m, x_N in readout.items()}
        values |= {f"speed/{m}": math.log(max(total, 1e-300)) for m, total in speed.items()}
        values |= {"joint": joint, "balance": float(worst.matters)}
        values = {f"diagnose/{key}": value for key, value in values.items()}
        return self._balance_line(worst, values, f"{len(rows)} rows of {name}"), values

    def _balance_line(self, worst: Lag, values: dict[str, float], where: str) -> str:
        m, leader = worst.modality, worst.leader
        slow, fast = (self._speed.sums.get(x, 0.0) for x in (m, leader))
        pace = "learns nothing" if not slow else f"learns {fast / slow:.1f}x slower"
        if slow > fast:
            pace = f"learns {slow / fast:.1f}x faster" if fast else f"learns, unlike {leader}"
        alone, readout, joint = (values[f"diagnose/{key}"] for key in (f"alone/{m}", f"readout/{m}", "joint"))
        return (
            f"{m} alone has {alone:.2f}, {_interval_text(worst.behind)} behind {leader}, and {pace}; a readout of its "
            f"latents has {readout:.2f}, {_interval_text(worst.room)} more (joint {joint:.2f}, {where}): "
            f"{_verdict('balancer', worst.matters)}"
        )

    def _rows(self, trainer: L.Trainer, pl_module: Any) -> tuple[str, Rows | None]:
        """Return the first validation set's name and rows: latents, label, and whether each decision is correct."""
        data: Any = datamodule_of(trainer)
        sets = data.evaluation_sets("validate") if hasattr(data, "evaluation_sets") else {}
        if not sets:
            return "a validation set", None
        name, held_out = next(iter(sets.items()))
        store, share = Store().to(pl_module.device), self.limit / max(len(held_out), 1)
        with eval_mode(pl_module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            for batch in plain_batches(trainer, data.evaluation_loader(held_out)):
                drawn_B = uniform_N(batch.index, "diagnose/limit") < share
                keep_B = _is_complete(_present(pl_module, batch), pl_module.labels(batch)) & drawn_B.to(
                    pl_module.device
                )
                # at least one row, so that ranks that share parameters run the same number of times
                rows_R = keep_B.nonzero()[:, 0] if bool(keep_B.any()) else slice(0, 1)
                batch, keep_R = batch.select(rows_R), keep_B[rows_R]
                z, label_R, present = pl_module.latents(batch), pl_module.labels(batch), _present(pl_module, batch)
                alone = pl_module.unimodal(z, present)
                targets = {f"alone/{m}": _right(logits_RC, label_R) for m, logits_RC in alone.items()}
                targets |= {"label": label_R, "joint": _right(pl_module.fuse(z, present), label_R)}
                store.update(z, Batch({}, dict.fromkeys(z, keep_R), targets, batch.index, batch.content_id))
        return name, store.compute()


def _present(pl_module: Any, batch: Batch) -> dict[str, Tensor]:
    return {m: batch.present[m] for m in pl_module.modalities}


def _is_complete(present: Mapping[str, Tensor], label_B: Tensor) -> Tensor:
    """Return bool ``[B]``: whether a row has all modalities and a label."""
    return torch.stack(list(present.values())).all(dim=0) & (label_B >= 0)


def _right(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    return logits_BC.argmax(dim=1) == label_B


def _by_shares(
    pl_module: MultimodalClassifier, z: dict[str, Tensor], present: Mapping[str, Tensor], label_B: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return bool ``[B]``, whether a row is right: by each modality's share of the logits, and by their sum."""
    shares = pl_module.shares(z, present)
    joint_BC = torch.stack(list(shares.values())).sum(dim=0)
    return {m: _right(x_BC, label_B) for m, x_BC in shares.items()}, _right(joint_BC, label_B)


def _percent(share: Interval) -> str:
    return f"{share.value:.0%} [{100 * share.low:.0f}, {100 * share.high:.0f}]".replace("%", " %")


def _interval_text(x: Interval) -> str:
    return f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]"


def _verdict(method: str, matters: bool) -> str:
    return f"a {method} could matter" if matters else f"no sign that a {method} could matter"
