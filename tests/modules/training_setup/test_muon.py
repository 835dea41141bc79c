"""Muon and AdamW as one optimizer: torch's own pieces to the bit, filters as matrices, resumed, on ranks, refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from descant.callbacks import Report, Resume
from descant.modules.training_setup.compile_and_shard import Shard
from descant.modules.training_setup.muon import ConvMuon
from descant.modules.training_setup.optim import Member, OptimizerGroup, parameter_groups
from descant.modules.training_setup.parameter_rules import HiddenMatrices
from descant.modules.training_setup.schedule import WarmupCosine
from descant.run.sharded import Sharded
from tests.quiet import quiet_trainer
from tests.ranks import run_ranks
from tests.tolerance import BF16, F32, rounding, ulps
from tests.toys import ToyData, ToyRecipe, ToyTower

Make = Callable[[Any], Optimizer]


def muon(params: Any) -> Optimizer:
    return Muon(params, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def conv_muon(params: Any) -> Optimizer:
    return ConvMuon(params, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=0.01, weight_decay=0.1)


class Net(nn.Module):
    """Embeds ids, convolves, and classifies: of everything one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.positions = nn.Parameter(torch.randn(5, 4))
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids_BT: Tensor) -> Tensor:
        h_BDT = self.conv((self.embedding(ids_BT) + self.positions).mT)
        h_BTD = self.norm(self.depthwise(h_BDT).mT)
        return self.head(h_BTD + self.down(torch.tanh(self.up(h_BTD)))).mean(1)


HIDDEN = ["up.weight", "down.weight"]


def group_of(net: nn.Module, make: Make = conv_muon, convolutions: bool = True) -> OptimizerGroup:
    return OptimizerGroup(parameter_groups(net), [Member(make, rule=HiddenMatrices(convolutions)), Member(adamw)])


def train(net: nn.Module, optimizers: list[Optimizer], schedules: list[Any], steps: int = 5) -> None:
    """With clipping and accumulation of two micro-batches."""
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(2):
            net(torch.randint(7, (4, 5), generator=g)).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        for one in (*optimizers, *schedules):
            one.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("make", [muon, conv_muon], ids=["torch", "ours"])
def test_a_group_of_muon_and_adamw_is_both_run_apart_bitwise(make: Make) -> None:
    one, two = Net(), Net()
    group = group_of(two, make, convolutions=False)
    assert list(group.shares[0].sizes) == HIDDEN
    named = dict(one.named_parameters())
    decayed = [p for n, p in named.items() if n not in HIDDEN and p.ndim > 1]
    vectors = {"params": [p for n, p in named.items() if p.ndim < 2], "weight_decay": 0.0}
    apart = [muon([named[n] for n in HIDDEN]), adamw([{"params": decayed}, vectors])]
    schedule = WarmupCosine(0.2)
    train(one, apart, [schedule(optimizer, 5) for optimizer in apart])
    train(two, [group], [schedule(group, 5)])
    assert same(one, two) and not same(two, Net())


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_a_filter_is_stepped_as_its_matrix_by_torch_bitwise(adjust: Any) -> None:
    g = torch.Generator().manual_seed(2)
    start, grads = torch.randn(6, 4, 3, 3, generator=g), torch.randn(4, 6, 4, 3, 3, generator=g)
    filters, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    ours, theirs = (kind([p], lr=0.1, adjust_lr_fn=adjust) for kind, p in ((ConvMuon, filters), (Muon, matrix)))
    for grad in grads:
        # layouts of gradients differ: with channels last, as a convolution of such an input may give it
        filters.grad = grad.to(memory_format=torch.channels_last)
        matrix.grad = grad.flatten(1).clone()
        ours.step()
        theirs.step()
    assert torch.equal(filters.flatten(1), matrix) and not torch.equal(filters, start)


def test_a_step_is_the_equation() -> None:
    g = torch.Generator().manual_seed(3)
    weight, grads = nn.Parameter(torch.randn(4, 6, generator=g)), torch.randn(2, 4, 6, generator=g)
    w, average = weight.detach().double(), torch.zeros(4, 6, dtype=torch.float64)
    optimizer = ConvMuon([weight], lr=0.1, weight_decay=0.5, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        weight.grad = grad
        optimizer.step()
        average = 0.9 * average + 0.1 * grad
        u = 0.1 * grad + 0.9 * average
        x = u / u.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        w = (1 - 0.1 * 0.5) * w - 0.1 * 0.2 * math.sqrt(6) * x
        # in bfloat16: five products of matrices, of terms near 1, times lr s = 0.05
        torch.testing.assert_close(weight.double(), w, rtol=0, atol=0.05 * ulps(5 * 4, BF16))
        assert 0.5 < float(torch.linalg.svdvals(x).min()) < float(torch.linalg.svdvals(x).max()) < 1.5


def test_the_control_moves_as_far_along_the_momentum() -> None:
    one, two = nn.Parameter(torch.ones(4, 2, 3)), nn.Parameter(torch.ones(4, 2, 3))
    method, sham = ConvMuon([one], lr=0.1), ConvMuon([two], lr=0.1, sham="normalize")
    for seed in range(3):
        before = two.detach().clone()
        for p in (one, two):
            p.grad = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(seed))
        start = one.detach().clone()
        method.step()
        sham.step()
        moved, wanted = (p.detach() - b * (1 - 0.1 * 0.1) for p, b in ((two, before), (one, start)))
        torch.testing.assert_close(moved.norm(), wanted.norm(), **rounding(48, F32))
        assert two.grad is not None
        along = two.grad.lerp(sham.state[two]["momentum_buffer"], 0.95)
        cosine = float(-(moved * along).sum() / moved.norm() / along.norm())
        assert cosine == pytest.approx(1, abs=ulps(48, F32))
    assert not torch.equal(one, two)


def test_a_group_resumes_bitwise_through_a_file(tmp_path: Path) -> None:
    model = Net()
    group = group_of(model)
    train(model, [group], [])
    torch.save([group.state_dict(), model.state_dict()], tmp_path / "x.pt")
    train(model, [group], [])
    saved, weights = torch.load(tmp_path / "x.pt", weights_only=True)
    assert sorted(saved["state"]) == list(range(len(list(model.parameters()))))
    other = Net()
    other.load_state_dict(weights)
    resumed = group_of(other)
    resumed.load_state_dict(saved)
    train(other, [resumed], [])
    assert same(model, other)


def test_which_parameters_are_hidden_matrices() -> None:
    net = Net()
    chosen = {c: list(group_of(net, convolutions=c).shares[0].sizes) for c in (True, False)}
    assert chosen == {True: ["conv.weight", *HIDDEN], False: HIDDEN}
    attention = nn.Sequential(nn.MultiheadAttention(4, 2, add_bias_kv=True))
    assert list(group_of(attention).shares[0].sizes) == ["0.in_proj_weight", "0.out_proj.weight"]
    rule, linear = HiddenMatrices(), nn.Linear(2, 2)
    besides = ["towers.image.patches", "lm.embed_tokens", "towers.text.visual_projection", "lm.layers.0.moe.router"]
    assert not any(rule.takes(f"{name}.weight", linear.weight, linear) for name in besides)
    assert rule.takes("lm.layers.0.q_proj.weight", linear.weight, linear)
    assert HiddenMatrices(besides="q_proj").takes("heads.weight", linear.weight, linear)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ConvMuon: x of shape \[3\]: only a matrix or a filter"):
        ConvMuon([{"params": [("x", nn.Parameter(torch.zeros(3)))]}])
    with pytest.raises(ValueError, match="contiguous"):
        ConvMuon([nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))])
    with pytest.raises(ValueError, match=r"momentum 1\.0 in 0\.\.1"):
        ConvMuon([nn.Parameter(torch.zeros(2, 2))], momentum=1.0)
    with pytest.raises(ValueError, match=r"besides '\(': no regular expression"):
        HiddenMatrices(besides="(")
    with pytest.raises(ValueError, match=r"pass parameter_groups\(module\)"):
        OptimizerGroup(list(parameter_groups(Net())), [Member(muon, rule=HiddenMatrices()), Member(adamw)])
    with pytest.raises(ValueError, match="with rule HiddenMatrices takes no parameter"):
        group_of(nn.Sequential(nn.LayerNorm(2)))
    with pytest.raises(ValueError, match="'positions'; add a last one"):
        OptimizerGroup(parameter_groups(Net()), [Member(muon, rule=HiddenMatrices())])
    plain = adamw(parameter_groups(Net()))
    with pytest.raises(ValueError, match=r"has groups of 7 \+ 7 tensors, this run's of 3 \+ 4 \+ 7: resume with"):
        group_of(Net()).load_state_dict(plain.state_dict())


# on ranks -----------------------------------------------------------------------------------------------------------


def _fit(rank: int, folder: Path, sharded: bool, path: Path | None) -> dict[str, Any]:
    """Eight steps on one of two ranks, or on a single one; the optimizer's state as it is saved."""
    torch.manual_seed(0)
    recipe = ToyRecipe(
        ToyTower(depth=2, width=5),  # five rows: parts differ in size
        ToyTower(width=5),
        optimizer=lambda groups: OptimizerGroup(groups, [Member(conv_muon, rule=HiddenMatrices()), Member(adamw)]),
        schedule=WarmupCosine(0.2),
        shard=Shard() if sharded else None,
    )
    trainer = quiet_trainer(
        folder,
        Resume(every=4, keep=9),
        Report(),
        strategy="auto" if rank < 0 else Sharded("gloo") if sharded else "ddp",
        devices=1 if rank < 0 else 2,
        max_steps=8,
        gradient_clip_val=0.5,
        limit_val_batches=0,
    )
    trainer.fit(recipe, datamodule=ToyData(), ckpt_path=path, weights_only=True)
    return {"step": trainer.global_step}


def _point(folder: Path, step: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Weights and momenta, by their names in the state dict or their order."""
    content = torch.load(folder / f"resume/step-{step:07d}.ckpt", weights_only=True)
    state = content["optimizer_states"][0]["state"]
    return content["state_dict"], [state[key]["momentum_buffer"] for key in state if "momentum_buffer" in state[key]]


def _equal(a: Any, b: Any, atol: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_a_fit_with_a_group_resumes_bitwise_and_lists_what_each_takes(tmp_path: Path, capsys: Any) -> None:
    _fit(-1, tmp_path / "whole", False, None)
    line = "optimizers: ConvMuon: 3 tensors, 65 parameters; AdamW: 3 tensors, 15 parameters"
    assert line in capsys.readouterr().err
    _fit(-1, tmp_path / "again", False, tmp_path / "whole/resume/step-0000004.ckpt")
    _equal(_point(tmp_path / "again", 8), _point(tmp_path / "whole", 8), atol=0)
    text = (tmp_path / "whole/optimizers.json").read_text()
    assert '"class": "ConvMuon"' in text and '"towers.image.layers.1.weight": 25' in text


@pytest.mark.ddp
@pytest.mark.slow
def test_ranks_and_shards_train_the_same_to_bfloat16_and_resume_bitwise(tmp_path: Path) -> None:
    _fit(-1, tmp_path / "one", False, None)
    for name, sharded in (("ddp", False), ("fsdp", True)):
        run_ranks(2, _fit, tmp_path / name, sharded, None)
        run_ranks(2, _fit, tmp_path / f"{name}-again", sharded, tmp_path / name / "resume/step-0000004.ckpt")
        _equal(_point(tmp_path / f"{name}-again", 8), _point(tmp_path / name, 8), atol=0)
        weights, momenta = _point(tmp_path / name, 8)
        assert len(momenta) == 3
        # eight steps of lr s = 0.02 * 0.2 sqrt(5) at most, each of five rounded products of matrices
        _equal(weights, _point(tmp_path / "one", 8)[0], atol=8 * 0.01 * ulps(5 * 5, BF16))
