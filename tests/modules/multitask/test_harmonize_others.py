"""``descant.harmonize`` in three lines on the modules of others: lightly's SimCLR, a Hugging Face model.

Letters: B samples, D width, T tokens.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from descant import harmonize
from descant.modules.core.rng import global_seed, mix
from descant.modules.multitask import FAMO, GradVac, PCGrad, Rule
from tests.step_toy import QUIET, KeepGradients
from tests.tolerance import F64, ulps


class TwoLosses(L.LightningModule):
    """A module with a trunk and a method ``losses``, and the three lines."""

    trunk: nn.Module
    rule: Rule | None = None

    def losses(self, *batch: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.terms = self.losses(*batch)
        return torch.stack([*self.terms.values()]).sum()

    def backward(self, loss: Tensor) -> None:
        assert self.rule is not None
        harmonize(self.terms, self.trunk, self.rule, loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SimCLR(TwoLosses):
    """As lightly's documentation writes it, of its own parts, with a classifier on the same trunk."""

    def __init__(self) -> None:
        super().__init__()
        loss = pytest.importorskip("lightly.loss")
        heads = pytest.importorskip("lightly.models.modules")
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.projection_head = heads.SimCLRProjectionHead(4, 8, 6)
        self.classifier, self.criterion = nn.Linear(4, 3), loss.NTXentLoss(temperature=0.5)

    def losses(self, x0: Tensor, x1: Tensor, label_B: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        h0_BD, h1_BD = (self.trunk(x).flatten(start_dim=1) for x in (x0, x1))
        contrastive = self.criterion(self.projection_head(h0_BD), self.projection_head(h1_BD))
        return {"contrastive": contrastive, "label": F.cross_entropy(self.classifier(h0_BD), label_B)}


class Bert(TwoLosses):
    """A tiny BERT of random weights under two heads: the next token of a text, and the class of the text."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
        plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.trunk = BertModel(BertConfig(num_hidden_layers=2, **sizes, **plain), add_pooling_layer=False)
        self.word, self.kind = nn.Linear(8, 20), nn.Linear(8, 3)

    def losses(self, id_BT: Tensor, label_B: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        h_BTD = self.trunk(input_ids=id_BT).last_hidden_state
        word = F.cross_entropy(self.word(h_BTD[:, :-1]).flatten(0, 1), id_BT[:, 1:].flatten())
        return {"word": word, "kind": F.cross_entropy(self.kind(h_BTD[:, 0]), label_B)}


def pictures() -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    x0, x1 = (torch.randn(8, 3, 9, 9, generator=g, dtype=torch.float64) for _ in range(2))
    return TensorDataset(x0, x1, torch.randint(3, (8,), generator=g))


def texts() -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(20, (8, 5), generator=g), torch.randint(3, (8,), generator=g))


def explicit(module: TwoLosses, batch: Any, rule: Rule) -> dict[str, Tensor]:
    """Gradients by the formula: a forward of its own for each term."""
    named = dict(module.named_parameters())
    losses, of_term = module.losses(*batch), []
    value_K = torch.stack([loss.detach() for loss in losses.values()])
    for k in losses:
        found = torch.autograd.grad(module.losses(*batch)[k], list(named.values()), allow_unused=True)
        of_term.append(
            {n: torch.zeros_like(p) if g is None else g for g, (n, p) in zip(found, named.items(), strict=True)}
        )
    flat_KP = torch.stack([torch.cat([g[n].flatten() for n in named if n.startswith("trunk.")]) for g in of_term])
    gramian_KK = (flat_KP @ flat_KP.T)[None] if rule.reads_gradients else torch.zeros(0)
    mix_K = rule.weights(gramian_KK, value_K, mix(global_seed(), "harmony", 0))[0]
    assert (mix_K - 1).abs().max() > 1e-3  # a rule that does something here
    ones_K = mix_K if not rule.reads_gradients else torch.ones_like(mix_K)
    weights = {n: mix_K if n.startswith("trunk.") else ones_K for n in named}
    return {n: sum(w * g[n] for w, g in zip(weights[n], of_term, strict=True)) for n in named}


@pytest.mark.parametrize("make", [PCGrad, lambda: FAMO(lr=0.5), lambda: GradVac(beta=0.5)])
@pytest.mark.parametrize(("module", "data"), [(SimCLR, pictures), (Bert, texts)])
def test_three_lines_on_a_module_of_others_equal_the_formula(module: Any, data: Any, make: Any) -> None:
    torch.manual_seed(0)
    model, keep = module().double(), KeepGradients()
    wanted = explicit(model, data().tensors, make())
    model.rule = make()
    L.Trainer(max_steps=1, callbacks=[keep], **QUIET).fit(model, DataLoader(data(), 8))
    size = max(float(g.abs().max()) for g in wanted.values())
    for name, g in keep.gradients.items():
        # sums over 8 rows, tokens and two layers
        assert float((g - wanted[name]).abs().max()) < ulps(4096, F64) * size, name
