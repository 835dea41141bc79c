"""MoMa (arXiv 2407.21770): noise of scores, shares of tokens by modality, what a last token moves, frozen backbones.

Letters: B rows, T tokens of a row, N tokens, E experts, V ids.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks import Accuracy, CausalGap
from descant.callbacks.evaluate.routing import by_choice
from descant.datamodules.tasks.text_tasks import Arithmetic, TextTasks
from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM, Sampling, generate
from descant.modules.language.depths import MixtureOfDepths
from descant.modules.moe import CausalAux, ExpertChoice, ExpertLayers, HardModality, Marks, Router
from descant.modules.moe.expert_choice import gumbel_sigmoid
from descant.recipes import Staged, VisionLanguage
from descant.recipes.base.stage import Stage
from tests._suites import Resume, ShamNeutral
from tests.tolerance import F64, rounding, statistical

#: Ids of text and marks, then of codes.
V, CODES, ANSWER, LENGTH = 30, 20, 19, 32


def choice(gumbel: bool = True, sham: Literal["permute"] | None = None, causal: bool = True) -> ExpertChoice:
    return ExpertChoice([[0, 1], [2, 3]], None, CausalAux(4) if causal else None, gumbel, sham)


def recipe(router: Router, depths: MixtureOfDepths | None = None, **options: Any) -> VisionLanguage:
    torch.manual_seed(0)
    experts = ExpertLayers(4, router, hidden=8)
    lm = CausalLM(V, 16, 2, 2, hidden=16, length=LENGTH, experts=experts, depths=depths, kinds=[CODES])
    for name, p in lm.named_parameters():
        if "moe" in name:
            p.data.mul_(10)
    return VisionLanguage(lm=lm, answer_token=ANSWER, **options)


def batch(rows: int = 4, length: int = 12) -> Batch:
    """Documents of text, then codes; the last one is short."""
    g = torch.Generator().manual_seed(1)
    text, codes = torch.randint(1, 19, (rows, 5), generator=g), torch.randint(CODES, V, (rows, length), generator=g)
    id_BT = torch.cat([text, torch.full((rows, 1), ANSWER), codes], dim=1)
    id_BT[-1, 9:] = 0
    mask_BT = (torch.arange(id_BT.shape[1]) > 5) & (id_BT > 0)
    here_B = {"text": torch.ones(rows, dtype=torch.bool)}
    return Batch({"text": id_BT, "loss_mask": mask_BT}, here_B, rng_seed=torch.arange(rows) * 7919 + 13)


def test_noise_of_scores_is_the_difference_of_two_gumbel_draws() -> None:
    g = torch.Generator().manual_seed(0)
    e_2NE = torch.rand(2, 4000, 3, generator=g, dtype=torch.float64)
    first, second = (-(-u.log()).log() for u in e_2NE)  # Gumbel, by its distribution function
    s_NE = torch.tensor([-1.0, 0.0, 2.0]).double().expand(4000, 3)
    a_NE = gumbel_sigmoid(s_NE, (first - second).sigmoid())
    torch.testing.assert_close(a_NE, (s_NE + first - second).sigmoid(), **rounding(64, F64))
    # above one half as often as sigmoid(s) says
    assert ((a_NE > 0.5).double().mean(dim=0) - s_NE[0].sigmoid()).abs().max() < statistical(0.5, 4000)


def test_draws_belong_to_tokens_and_stand_in_training_alone() -> None:
    torch.manual_seed(0)
    router, h_ND = choice().build(8, 4).double(), torch.randn(40, 8).double()
    marks = Marks(torch.arange(40) % 2, key=torch.arange(40) * 7919)
    turn_N = torch.randperm(40)
    scores = router.scores(h_ND, marks)
    assert torch.equal(scores[turn_N], router.scores(h_ND[turn_N], marks.map(lambda x: x[turn_N])))
    plain = (h_ND @ router.gate_ED.T).sigmoid()
    assert ((scores - plain).abs() > 1e-3).double().mean() > 0.9  # logistic noise is of size 1.8
    router.layer = 1
    assert not torch.equal(scores, router.scores(h_ND, marks)), "layers draw apart"
    assert torch.equal(router.eval().scores(h_ND, marks), plain)
    router.train().gate_ED.requires_grad_(False)
    assert torch.equal(router.scores(h_ND, marks), plain), "a gate that is frozen explores nothing"
    router.gate_ED.requires_grad_(True)
    with pytest.raises(ValueError, match="ExpertChoice routes by key: give the key of each token in marks"):
        router(h_ND, marks._replace(key=None))


@pytest.mark.parametrize("gumbel", [False, True])
def test_each_expert_takes_its_share_of_its_modality_and_padding_none(gumbel: bool) -> None:
    routings: list[Any] = []
    made, some = recipe(choice(gumbel)), batch()
    made.read(some, routings)
    real = some.inputs["text"] > 0
    of_kind = [int((real & (some.inputs["text"] < CODES)).sum()), int((some.inputs["text"] >= CODES).sum())]
    assert len(routings) == 2
    for routing in routings:
        valid_N = routing.marks.valid
        assert not routing.used[~valid_N].any() and int(valid_N.sum()) == sum(of_kind)
        for e in range(4):
            took_N = ((routing.expert == e) & routing.used).any(dim=1)
            assert int(took_N.sum()) == math.ceil(of_kind[e // 2] / 2)
            assert (routing.marks.kind[took_N] == e // 2).all()


def logits(made: VisionLanguage, id_BT: Tensor) -> Tensor:
    here = Batch({"text": id_BT, "loss_mask": id_BT > 0}, {"text": torch.ones(len(id_BT), dtype=torch.bool)})
    return made.lm.logits(made.read(here)[1])


@pytest.mark.parametrize("depths", [False, True])
def test_a_last_token_moves_earlier_logits_under_raw_choice_alone(depths: bool) -> None:
    made = recipe(choice(), MixtureOfDepths(0.5, auxiliary=CausalAux(4)) if depths else None).eval()
    for part in made.modules():
        if isinstance(part, CausalAux):
            part.outward_EF.data.mul_(50)  # of an untrained one all are near the threshold
    id_BT = batch().inputs["text"][:3]
    other = id_BT.clone()
    other[:, -1] = CODES + (other[:, -1] - CODES + 3) % (V - CODES)
    with torch.no_grad():
        moved = (logits(made, id_BT) - logits(made, other))[:, :-1].abs().max()
        with by_choice(made) as routers:
            assert len(routers) == 2 + depths and not any(router.causal for router in routers)
            leaked = (logits(made, id_BT) - logits(made, other))[:, :-1].abs().max()
    assert float(moved) < 1e-6 < 1e-3 < float(leaked)  # as asked; a choice that moves is an expert's whole output


def test_the_backbone_is_frozen_while_causal_routers_are_fitted() -> None:
    stages = {"learn": Stage(), "routers": Stage(train="auxiliary")}
    staged = Staged(recipe(choice()), stages, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1))
    staged.configure_model()
    staged._choose("routers")
    before = {name: x.clone() for name, x in staged.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in staged.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        staged.objective_of(batch()).total.backward()
        losses.append(float(staged.forward(batch()).aux["experts/causal"].value.detach()))
        optimizer.step()
    moved = {name for name, x in staged.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if "auxiliary" in name} and len(moved) == 4
    assert losses[-1] < 0.5 * losses[0], "the choice that they learn is the same in each step, without noise"


def test_generated_codes_are_of_their_kind() -> None:
    lm, prompt = recipe(HardModality([1, 3])).lm.eval(), batch().inputs["text"][:2, :6]
    lm.embedding.weight.data[CODES:] *= 5  # so that some are generated
    end = Marks(torch.zeros(2, 7).long(), torch.zeros(2, 7).long())
    made = generate(lm, prompt, new=4, sampling=Sampling(temperature=0), marks=end).token_RN
    assert lm.kind_of(made[:, :-1]).any() and lm.kind_of(torch.tensor([19, 20])).tolist() == [0, 1]
    for row, expected in zip(prompt, made.tolist(), strict=True):
        for token in expected:
            h_1TD = lm(lm.embed(row[None]), marks=Marks(lm.kind_of(row)[None]))
            assert int(lm.logits(h_1TD)[0, -1].argmax()) == token
            row = torch.cat([row, torch.tensor([token])])
    with pytest.raises(ValueError, match=r"kinds \[5, 3\]: rising ids from 1 to 10"):
        CausalLM(11, 8, 1, 2, kinds=[5, 3])


def text() -> TextTasks:
    return TextTasks({"sums": Arithmetic(["plus"])}, numbers=200, held=60, length=24, batch_size=8, tiny=True)


def model(router: Router) -> VisionLanguage:
    torch.manual_seed(0)
    lm = CausalLM(266, 8, 1, 2, length=24, experts=ExpertLayers(4, router, hidden=8), kinds=[ord("5") + 3])
    return VisionLanguage(lm=lm, answer_token=265, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2))


class TestResumedNoise(Resume):
    """Draws of a step that is run again are the same."""

    def recipe(self) -> VisionLanguage:
        return model(choice())

    def data(self) -> Any:
        return text()


class TestPermutedKinds(ShamNeutral):
    def recipe(self) -> VisionLanguage:
        return recipe(choice(gumbel=False)).double()

    def batch(self) -> Batch:
        return batch()

    def sham(self, mode: Any) -> VisionLanguage:
        return recipe(choice(gumbel=False, sham=mode)).double()

    def calls(self, recipe: Any) -> int:
        return sum(layer.moe.router.permuted.calls for layer in recipe.lm.blocks())


def test_both_losses_of_a_set_are_logged(tmp_path: Path) -> None:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[Accuracy(), CausalGap()], **options)
    trainer.validate(model(choice()), text(), verbose=False)
    values = {name: float(x) for name, x in trainer.callback_metrics.items()}
    assert {"val/loss", "val/loss_by_choice", "val/accuracy_by_choice"} <= set(values)
    assert 0 < abs(values["val/loss"] - values["val/loss_by_choice"]) < 1
