"""Uni-MoE-2.0-Omni (arXiv 2511.12609): dynamic capacity, null experts, positions of three axes, GSPO, stored pairs.

Letters: B rows, T tokens of a row, N tokens or questions, E experts, G answers to a question, S shared experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from descant.callbacks import Accuracy, ExpertsByEntropy, Rollouts, Stages
from descant.callbacks.evaluate.routing import by_entropy
from descant.datamodules.combined.stages import StageData, StagedData
from descant.datamodules.tasks.question_pool import QuestionRollouts
from descant.datamodules.tasks.questions import Questions
from descant.datamodules.tasks.rollout_pairs import RolloutPairs, RolloutPairSet
from descant.modules.core.batch import Batch
from descant.modules.distill.distill import Distill
from descant.modules.language import CausalLM
from descant.modules.language.axis_rope import AxisRoPE
from descant.modules.language.positions import VisualAxes
from descant.modules.moe import ExpertLayers, Marks, MoELayer, TopPRouter
from descant.modules.moe.balance import expert_terms, usage
from descant.modules.policy import AnswerRatio, Clipped, PolicyLoss, SequenceMean
from descant.modules.policy.rewards import ExactAnswer, Rewards
from descant.modules.towers import Towers
from descant.recipes import DPO, GRPO, Stage, Staged, VisionLanguage
from descant.recipes.base.distillation import TeacherStage
from tests._suites import MissingModalities, Ranks, ShamNeutral
from tests.callbacks.checkpoints.test_resume import fit
from tests.recipes.test_vision_language import Patches, batch, sees
from tests.small import small_chat
from tests.tolerance import F32, F64, rounding, ulps

SEEN: dict[str, Any] = {"size": 24, "length": 64, "tiny": True, "kinds": ["colour", "count"]}
N, G = 4, 4


@pytest.mark.parametrize("shared", [0, 2])
def test_weights_with_null_sum_to_one_and_k_counts_the_mass(shared: int) -> None:
    torch.manual_seed(0)
    router, h_ND = TopPRouter(p=0.7, null_experts=1).build(8, 4, shared).double(), 30 * torch.randn(50, 8).double()
    routing = router(h_ND)
    p_NE = (h_ND @ router.gate_ED[:5].T).softmax(dim=1).sort(dim=1, descending=True).values
    for n in range(50):
        mass, k = 0.0, 0
        while mass < 0.7:  # the fewest that reach it
            mass, k = mass + float(p_NE[n, k]), k + 1
        assert int(routing.used[n].sum()) == k == int((p_NE[n].cumsum(0) < 0.7).sum()) + 1
    whole_N = (routing.weight * routing.used).sum(dim=1) + (0 if routing.shared is None else routing.shared.sum(dim=1))
    torch.testing.assert_close(whole_N, torch.ones(50).double(), **rounding(16, F64))
    assert bool((routing.expert[routing.used] == 4).any()) and set(routing.used.sum(dim=1).tolist()) >= {1, 2, 3}


def test_null_experts_cost_no_flops() -> None:
    layer, x_ND = MoELayer(8, 16, 4, TopPRouter(p=0.5, null_experts=1)), torch.randn(32, 8).abs()

    def flops() -> tuple[int, int]:
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            _, routing = layer(x_ND)
        return counted.get_total_flops(), int(routing.runs(4).sum())

    gate, expert = 2 * 32 * 8 * 5, 2 * 3 * 8 * 16  # of all tokens; of one token in one expert
    gate_ED: Any = layer.router.gate_ED
    gate_ED.data.normal_()
    some, rows = flops()
    assert 0 < rows < 64 and some == gate + expert * rows
    gate_ED.data[:4], gate_ED.data[4] = -9, 9  # all to the null expert
    assert flops() == (gate, 0)
    assert float(layer(x_ND)[0].detach().abs().max()) == 0


@pytest.mark.parametrize(("over", "answers"), [("all", 1.0), ("all", 10.0), ("chosen", 1.0), ("chosen", 10.0)])
def test_the_balance_loss_is_that_of_a_loop(over: Any, answers: float) -> None:
    torch.manual_seed(0)
    experts = ExpertLayers(4, TopPRouter(p=0.7, null_experts=1), shared=2, balance=0.025, balance_over=over)
    router, h_ND = TopPRouter(p=0.7, null_experts=1).build(8, 4, 2).double(), 30 * torch.randn(50, 8).double()
    valid_N, weight_N = torch.arange(50) % 7 != 0, torch.where(torch.arange(50) % 3 == 0, answers, 1.0)
    routing = router(h_ND, Marks(valid=valid_N, weight=weight_N))
    share, mass, whole = [0.0] * 5, [0.0] * 5, float(weight_N[valid_N].sum())
    for n in valid_N.nonzero().flatten().tolist():
        chosen = [int(e) for e, used in zip(routing.expert[n], routing.used[n], strict=True) if used]
        among = chosen if over == "chosen" else list(range(5))
        score = {e: math.exp(float(h_ND[n] @ router.gate_ED[e])) for e in among}
        for e in among:
            share[e] += float(weight_N[n]) * (e in chosen) / whole
            mass[e] += float(weight_N[n]) * score[e] / sum(score.values()) / whole
    wanted = 0.025 * 5 * sum(f * p for f, p in zip(share, mass, strict=True))
    (term,) = expert_terms(experts, [routing]).values()
    torch.testing.assert_close(term.value[0].detach(), torch.tensor(wanted, dtype=F64), **rounding(256, F64))


@pytest.mark.parametrize("over", ["all", "chosen"])
def test_tokens_of_answers_weigh_more_in_the_balance_loss(over: Any) -> None:
    values = []
    for answers in (1.0, 10.0):
        made, some = recipe().double().train(), batch()
        made.lm.experts.balance_over, made.lm.experts.answers = over, answers  # type: ignore[union-attr]
        routings: list[Any] = []
        _, _, row = made.read(some, routings)
        weight = sum(float(usage(routing).token_M) for routing in routings) / len(routings)
        ends = int(row.real_BS.sum()) + (answers - 1) * int((row.loss_mask_BS & row.real_BS).sum())
        assert weight == pytest.approx(ends, rel=ulps(64, F32))
        (term,) = expert_terms(made.lm.experts, routings).values()
        term.value.sum().backward()
        gate: Any = made.lm.blocks()[0].moe.router.gate_ED  # type: ignore[union-attr]
        assert gate.grad.isfinite().all() and bool(gate.grad.any())
        values.append(float(term.value.detach()))
    assert values[0] != values[1]


def recipe(sham: Literal["permute"] | None = None, plain: bool = False) -> VisionLanguage:
    torch.manual_seed(0)
    experts = ExpertLayers(3, TopPRouter(0.6, null_experts=1, sham=sham), hidden=8, shared=1, shared_hidden=4)
    lm = CausalLM(20, 16, 2, 1, length=64, experts=experts, positions=None if plain else AxisRoPE())
    for name, p in lm.named_parameters():
        if "gate_ED" in name:
            p.data.mul_(40)
    return VisionLanguage(**sees(lm, Towers(image=Patches())), visual=None if plain else VisualAxes())


def test_text_alone_has_the_positions_of_rope_to_the_bit_and_images_have_not() -> None:
    some = batch()
    blind = replace(some, present={**some.present, "image": torch.zeros_like(some.present["image"])})
    axes, plain = recipe().double(), recipe(plain=True).double()
    plain.load_state_dict(axes.state_dict())
    with torch.no_grad():
        assert torch.equal(axes.read(blind)[1], plain.read(blind)[1])
        assert not torch.equal(axes.read(some)[1], plain.read(some)[1])


class TestUniMoE(MissingModalities, Ranks):
    def recipe(self) -> VisionLanguage:
        return recipe()

    def batch(self) -> Batch:
        return batch()

    @pytest.mark.slow
    def test_two_ranks_equal_one(self) -> None:
        super().test_two_ranks_equal_one()


class TestPermutedInput(ShamNeutral):
    def recipe(self) -> VisionLanguage:
        return recipe().double()

    def batch(self) -> Batch:
        return batch()

    def sham(self, mode: Any) -> VisionLanguage:
        return recipe(mode).double()

    def calls(self, recipe: Any) -> int:
        return sum(layer.moe.router.permuted.calls for layer in recipe.lm.blocks())


def test_experts_are_counted_at_the_tokens_that_they_are_of() -> None:
    made, some = recipe().double().eval(), batch()
    entropy_N, experts_N, sample_N = made.token_experts(some)
    _, h_BSW, row = made.read(some)
    at = 0
    for b in range(len(some)):
        keep_S = row.real_BS[b]
        if not keep_S.any():
            continue
        alone_1SW = made.sequence(some)[0][b : b + 1, keep_S]
        place = row.position_BS[b : b + 1, :-1][:, keep_S]  # type: ignore[index]
        routings: list[Any] = []
        made.lm(alone_1SW, None, place, marks=Marks(), routings=routings)
        k_S = torch.stack([routing.runs(3).sum(dim=1) for routing in routings]).double().mean(dim=0)
        for s in row.loss_mask_BS[b].nonzero().flatten().tolist():
            p_V = made.lm.logits(h_BSW[b, s - 1]).softmax(dim=0)
            assert int(sample_N[at]) == b and float(experts_N[at]) == float(k_S[s - 1])
            torch.testing.assert_close(entropy_N[at], torch.special.entr(p_V).sum(), **rounding(64, F64))
            at += 1
    assert at == len(sample_N) and len(set(experts_N.tolist())) > 1
    e_N, k_N = torch.rand(40), torch.rand(40)
    order = e_N.argsort()
    assert by_entropy(e_N, k_N) == (k_N[order[:10]].double().mean(), k_N[order[-10:]].double().mean())


# GSPO, then DPO on what it has sampled ------------------------------------------------------------------------------


def staged_data(**options: Any) -> StagedData:
    return StagedData(
        {
            "answers": StageData(Questions(batch_size=16, **SEEN), steps=2),
            "reward": StageData(QuestionRollouts(items=N, group=G, batch_size=N * G, keep=3, **SEEN), 4),
            "prefer": StageData(RolloutPairs(of="reward", batch_size=6), **options),
        },
        evaluate="answers",
    )


def stored(data: StagedData) -> tuple[QuestionRollouts, RolloutPairs]:
    """Rollouts as a callback renews them: of each question none, all, or some of the answers are correct."""
    source: Any = data.stages["reward"].data
    for version in range(4):
        problems = source.fresh(version)
        answer_NM = source.asked_set(problems).rows(np.arange(N), np.zeros(N, dtype=np.int64)).targets["answer"]
        said_RM = answer_NM.repeat_interleave(G, dim=0)
        length_R = (said_RM > 0).sum(dim=1) + 1
        said_RM[torch.arange(len(said_RM)), length_R - 1] = 2  # the end
        wrong_R = torch.tensor([g >= n for n in range(N) for g in range(G)])  # question n: n are correct
        said_RM[wrong_R, 0] = 300 + version
        rolled = {"said": said_RM, "length": length_R, "ended": torch.ones(N * G, dtype=torch.bool)}
        source.renew(problems, rolled, version)
    pairs: Any = data.stages["prefer"].data
    return source, pairs


def test_a_pair_is_a_correct_and_a_wrong_answer_to_one_question() -> None:
    source, pairs = stored(staged_data())
    assert source.stored is not None and len(source.stored.problems) == 3 * N, "the latest three"
    assert pairs.correct_NG.sum(axis=1).tolist() == [0, 1, 2, 3] * 3
    held: Any = pairs.training_set()
    assert isinstance(held, RolloutPairSet) and len(held) == 3 * N and bool(held.present(np.arange(12))["text"].all())
    rows = held.rows(np.arange(3 * N), np.arange(3 * N))
    for n, (right, wrong) in enumerate(zip(rows.inputs["text"], rows.inputs["text_neg"], strict=True)):
        first = right.tolist().index(source.answer_token) + 1
        assert torch.equal(right[:first], wrong[:first])
        assert source.spell(right[first:].tolist()) == source.spell(
            [i for i in rows.targets["answer"][n].tolist() if i]
        )
        assert int(wrong[first]) == 301 + n // N
    assert not torch.equal(rows.inputs["loss_mask"].sum(1), torch.zeros(12)) and "image" in rows.inputs
    pairs.correct_NG[2] = True
    present = held.present(np.arange(12))["text"].tolist()
    assert present == [n != 2 for n in range(12)], "always correct: no pair"
    again = staged_data()
    again.stages["reward"].data.load_state_dict(source.state_dict())
    other: Any = again.stages["prefer"].data
    text = other.training_set().rows(np.arange(12), np.arange(12)).inputs["text_neg"]
    assert torch.equal(text, rows.inputs["text_neg"]), "they are in a checkpoint"


def test_stages_go_from_gspo_to_dpo_of_what_it_sampled(tmp_path: Path) -> None:
    gspo = PolicyLoss(Clipped(3e-3, 4e-3, AnswerRatio()), SequenceMean())
    torch.manual_seed(0)
    stages = {"answers": Stage(), "reward": Stage(GRPO(gspo)), "prefer": Stage(DPO())}
    net = Staged(
        VisionLanguage(**small_chat(), new=3),
        stages,
        distill=Distill(TeacherStage()),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    )
    data, rollouts = staged_data(), Rollouts(Rewards({"right": ExactAnswer()}))
    trainer, _ = fit(tmp_path, Stages(), rollouts, net=net, data=data, max_epochs=-1, limit_val_batches=0)
    source: Any = data.stages["reward"].data
    assert trainer.global_step == 2 + 4 + 2 and len(source.stored.problems) == 3 * N


def test_one_line_for_pairs_without_rollouts() -> None:
    rolled, pairs = QuestionRollouts(items=4, group=4, batch_size=16, **SEEN), RolloutPairs(of="reward", batch_size=6)
    with pytest.raises(ValueError, match="stage 'prefer': of 'reward': its data keeps no rollouts; set its keep"):
        StagedData({"reward": StageData(rolled), "prefer": StageData(pairs)})
    with pytest.raises(ValueError, match="stage 'prefer': of 'reward'"):
        StagedData({"prefer": StageData(RolloutPairs(of="reward", batch_size=6)), "reward": StageData(rolled)})
    with pytest.raises(ValueError, match="its rollouts are those of another stage; use it in StagedData"):
        RolloutPairs(of="reward").training_set()
    with pytest.raises(ValueError, match="stage 'reward' has no rollouts yet"):
        staged_data().stages["prefer"].data.training_set().present(np.arange(2))


def test_experts_by_entropy_are_logged(tmp_path: Path) -> None:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    torch.manual_seed(0)
    chat = small_chat()
    lm = CausalLM(8194, 16, 1, 1, length=64, experts=ExpertLayers(3, TopPRouter(null_experts=1), hidden=8))
    made = VisionLanguage(**{**chat, "lm": lm})
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[Accuracy(), ExpertsByEntropy()], **options
    )
    trainer.validate(made, Questions(batch_size=16, **SEEN), verbose=False)
    values = {name: float(x) for name, x in trainer.callback_metrics.items()}
    assert 0 < values["val/experts"] < 3 and {"val/experts_certain", "val/experts_uncertain"} <= set(values)
