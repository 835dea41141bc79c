"""Uni-MoE (arXiv 2405.11273): equal experts are the dense layer; experts of stages, whose steps count; resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.callbacks import Resume
from descant.datamodules.combined.stages import StageData, StagedData
from descant.modules.adaptation.expert_weights import interleave_expert_units, plan_conversion
from descant.modules.adaptation.stage_changes import Rewind, StageChange
from descant.modules.adaptation.upcycle import Assemble, Upcycle
from descant.modules.language import CausalLM
from descant.modules.moe import ExpertLayers, MoELayer, TopKRouter
from tests._suites import SampleData
from tests.callbacks.checkpoints.test_resume import Act, equal, point, state
from tests.recipes import test_growing as growing
from tests.recipes.test_growing import STEPS
from tests.tolerance import F32, F64

D, HIDDEN, E = 8, 24, 4


def layer(norm: Literal["before", "after"], dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
    """A layer of equal experts, and its dense weights."""
    g = torch.Generator().manual_seed(0)
    gate_up = torch.randn(2 * HIDDEN, D, generator=g, dtype=F64).to(dtype)
    down = torch.randn(D, HIDDEN, generator=g, dtype=F64).to(dtype)
    moe = MoELayer(D, HIDDEN, E, TopKRouter(2, norm)).to(dtype)
    moe.load_state_dict({
        "router.gate_ED": torch.randn(E, D, generator=g, dtype=F64).to(dtype),
        "experts.gate_up": torch.stack([gate_up] * E),
        "experts.down": torch.stack([down] * E),
    })  # fmt: skip
    return moe, gate_up, down


@pytest.mark.parametrize(("dtype", "near"), [(F32, 1e-5), (F64, 1e-12)])  # of outputs of about 1, after two products
def test_equal_experts_give_the_dense_output_after_softmax_on_the_chosen_and_not_before(
    dtype: torch.dtype, near: float
) -> None:
    h_ND = 0.1 * torch.randn(50, D, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs: dict[str, Tensor] = {}
    for norm in ("after", "before"):
        moe, gate_up, down = layer(norm, dtype)
        gate, up = (h_ND @ gate_up.T).chunk(2, dim=1)
        dense_ND = (F.silu(gate) * up) @ down.T
        outputs[norm], routing = moe(h_ND)
        weight_N1 = routing.weight.sum(dim=1, keepdim=True)
        torch.testing.assert_close(outputs[norm], weight_N1.to(dtype) * dense_ND, rtol=0, atol=near)
    torch.testing.assert_close(outputs["after"], dense_ND, rtol=0, atol=near)
    assert (outputs["before"] - dense_ND).abs().max() > 0.01 * dense_ND.abs().max()
    assert (outputs["before"].norm(dim=1) < dense_ND.norm(dim=1)).all()  # it shrinks


@pytest.mark.parametrize(("norm", "same"), [("after", True), ("before", False)])
def test_so_it_is_in_a_language_model(norm: Any, same: bool) -> None:
    torch.manual_seed(0)
    lm = CausalLM(20, 8, 2, 2).double()
    for p in lm.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    ids_BT, other = torch.randint(0, 20, (3, 6)), copy.deepcopy(lm)
    plan_conversion(other, ExpertLayers(E, TopKRouter(2, norm))).apply(other)  # which Upcycle refuses before
    difference = (other(other.embed(ids_BT)) - lm(lm.embed(ids_BT))).detach().abs().max()
    assert (float(difference) < 1e-12) == same  # as above
    if not same:
        assert difference > 1e-3
        with pytest.raises(ValueError, match="do not sum to 1"):
            Upcycle(ExpertLayers(E, TopKRouter(2, norm)))


def test_dealt_units_leave_the_sum_over_experts_as_it_is() -> None:
    """A unit's row and column go together, so that the mean of all experts on one input stays."""
    g = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(*size, generator=g, dtype=F64) for size in ((3, 2 * HIDDEN, D), (3, D, HIDDEN)))
    turn_EF, x_D = torch.rand(3, HIDDEN, generator=g).argsort(dim=0), torch.randn(D, generator=g, dtype=F64)

    def each(gate_up: Tensor, down: Tensor) -> Tensor:
        gate_EF, up_EF = (gate_up @ x_D).chunk(2, dim=1)
        return torch.einsum("edf,ef->ed", down, F.silu(gate_EF) * up_EF)

    one_ED, other_ED = (
        each(gate_up, down),
        each(interleave_expert_units(gate_up, turn_EF, 0), interleave_expert_units(down, turn_EF, 1)),
    )
    torch.testing.assert_close(other_ED.sum(dim=0), one_ED.sum(dim=0), rtol=0, atol=1e-11)  # 72 products of about 10
    assert ((one_ED[:, None] - other_ED[None]).abs().amax(dim=2) > 0.1).all()  # none of them is one that was


# in one run -----------------------------------------------------------------------------------------------------------

EXPERTS = ExpertLayers(2, TopKRouter(2))


def stages(**options: Any) -> dict[str, list[StageChange]]:
    return {
        "align": [],
        "pictures": [],
        "speech": [Rewind(to="align")],
        "all": [Rewind(to="align"), Assemble(EXPERTS, stages=["pictures", "speech"], **options)],
    }


class Begun(L.Callback):
    """The model before the first step of each stage, and after the last one."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.steps = 0

    def on_train_batch_start(self, trainer: L.Trainer, net: Any, batch: Any, i: int) -> None:
        if trainer.global_step % STEPS == 0:
            self.states.append(state(net.inner))

    def on_train_epoch_end(self, trainer: L.Trainer, net: Any) -> None:
        self.steps = trainer.global_step
        self.states.append(state(net.inner))


def test_experts_are_what_stages_left_all_else_is_of_the_first_and_their_steps_count(tmp_path: Path) -> None:
    begun = Begun()
    growing.run(tmp_path, begun, grown=stages(), ema=[])
    _, align, _, pictures, again, speech, assembled, _ = begun.states
    assert begun.steps == 4 * STEPS  # of the assembled model: those of its experts, too
    assert equal(again, align)  # each expert begins where the first stage ended
    for tower in ("image", "text"):
        place = f"towers.{tower}.layers.0."
        for expert, dense in (("inward", "mlp.0.weight"), ("outward", "mlp.2.weight")):
            both = torch.stack([pictures[place + dense], speech[place + dense]])
            assert torch.equal(assembled[f"{place}moe.experts.{expert}"], both)
            assert not torch.equal(both[0], both[1])
    rest = {name: x for name, x in assembled.items() if ".moe." not in name}
    assert len(rest) > 10 and equal(rest, {name: align[name] for name in rest})


@pytest.mark.parametrize(
    ("sham", "steps"),
    [(None, [STEPS + 1, 2 * STEPS, 3 * STEPS - 1, 3 * STEPS]), ("permute", [3 * STEPS + 1])],
)
def test_killed_in_any_stage_it_ends_in_the_same_bits(tmp_path: Path, sham: Any, steps: list[int]) -> None:
    act = Act()
    _, net = growing.run(tmp_path / "a", act, Resume(every=1, keep=99), grown=stages(sham=sham))
    for step in steps:
        again, path = Act(), point(tmp_path / "a", step)
        _, other = growing.run(tmp_path / str(step), again, Resume(), grown=stages(sham=sham), path=path)
        assert equal(state(other), state(net)) and again.losses == act.losses[step:]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (Rewind(to="alinged"), "stages.all: Rewind: weights left by alinged; before it: align, pictures"),
        (
            Assemble(EXPERTS, stages=["pictures", "all"]),
            "stages.all: Assemble: weights left by all; before it: align, pic",
        ),
    ],
)
def test_a_stage_that_is_not_before_is_refused_before_training(tmp_path: Path, change: StageChange, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        growing.run(tmp_path, grown={"align": [], "pictures": [], "all": [change]})


def test_a_stage_that_is_left_out_leaves_no_weights(tmp_path: Path) -> None:
    data = {name: StageData(SampleData(24, 12, growing.NAMES), 1, STEPS) for name in stages()}
    data["speech"].epochs = 0
    with pytest.raises(ValueError, match=r"stages.all: Assemble: no weights left by speech: it has not trained"):
        growing.run(tmp_path, grown=stages(), data=StagedData(data))
