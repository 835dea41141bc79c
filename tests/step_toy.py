"""A toy recipe whose whole step can also be written as an explicit loop over samples, in double precision.

One linear trunk on a shared input, forked to two terms; samples lack modalities, carry weights, and the terms are
mixed unequally. ``explicit`` computes the gradient of one whole optimizer step from the formulas alone.
Letters: B samples, D width, K terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.towers.base import Tokens, Tower
from descant.recipes.base.recipe import Recipe
from tests.quiet import SILENT

#: A trainer that writes nothing, on the CPU, without validation; the data's sampler cuts the batch over ranks.
QUIET: dict[str, Any] = {**SILENT, "limit_val_batches": 0}
MIX = {"a": 0.5, "b": 2.0}
N, D = 12, 6


def project_conflicts(g_KBD: Tensor, names: tuple[str, ...]) -> Tensor:
    """Per-sample PCGrad of two terms: each gradient loses its part against the other where they conflict."""
    a, b = g_KBD
    dot = (a * b).sum(-1, keepdim=True)
    conflict = dot < 0
    a_new = a - torch.where(conflict, dot / (b * b).sum(-1, keepdim=True).clamp(min=1e-300), 0.0) * b
    b_new = b - torch.where(conflict, dot / (a * a).sum(-1, keepdim=True).clamp(min=1e-300), 0.0) * a
    return a_new + b_new


def content(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    weight = torch.rand(N, generator=generator, dtype=torch.float64) + 0.5
    has_a = torch.tensor([True] * 8 + [False, True, False, True])
    has_b = torch.tensor([False, True, True] * 4)
    return {"x": x.to(dtype), "y": y.to(dtype), "weight": weight.to(dtype), "a": has_a, "b": has_b}


class ToySet(BatchDataset):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(seed=0)
        self.data = content(dtype)

    def __len__(self) -> int:
        return N

    def present(self, index_N: Any) -> dict[str, Tensor]:
        return {"a": self.data["a"][index_N], "b": self.data["b"][index_N]}

    def rows(self, index_B: Any, draw_B: Any) -> Rows:
        x_BD = self.data["x"][index_B]
        targets = {"y": self.data["y"][index_B], "weight": self.data["weight"][index_B]}
        return Rows({"a": x_BD, "b": x_BD}, targets, torch.from_numpy(index_B))


class ToyData(DataModule):
    def __init__(self, dtype: torch.dtype, batch_size: int = N) -> None:
        super().__init__(batch_size=batch_size)
        self.dtype = dtype

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("a", "b")

    def training_set(self) -> ToySet:
        return ToySet(self.dtype)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": ToySet(self.dtype)}

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return []


class Trunk(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.width = D
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        h_BD = x
        for layer in self.layers:
            h_BD = layer(h_BD)
        return Tokens(h_BD[:, None], torch.ones(len(x), 1, dtype=torch.bool, device=x.device))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


class ToyRecipe(Recipe):
    """``given``: whether terms say which modalities they are of, so that the step's counts are known beforehand."""

    def __init__(self, harmonize: bool = True, given: bool = True, **kwargs: Any) -> None:
        super().__init__(optimizer=torch.optim.SGD, mix=MIX, **kwargs)
        self.given = given
        generator = torch.Generator().manual_seed(3)
        self.towers = nn.ModuleDict({"trunk": Trunk()})
        self.heads = nn.ModuleDict({"a": nn.Linear(D, 2), "b": nn.Linear(D, 2)})
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
        if harmonize:
            self.hooks.rule = project_conflicts

    def forward(self, batch: Batch) -> Output:
        z_BD = self.towers["trunk"](batch.inputs["a"]).h_BTD[:, 0]
        copies = self.hooks.fork(z_BD, ("a", "b"))
        y, weight = batch.targets["y"], batch.targets["weight"]
        a_B = F.mse_loss(self.heads["a"](copies["a"]), y, reduction="none").sum(1)
        b_B = F.mse_loss(self.heads["b"](copies["b"]), -y, reduction="none").sum(1)
        terms = {
            "a": Term(a_B, weight=weight, valid=batch.present["a"], given=("a",) if self.given else ()),
            "b": Term(b_B, weight=weight, valid=batch.present["b"], given=("b",) if self.given else ()),
        }
        return Output(terms)


class KeepGradients(L.Callback):
    """The gradients just before the optimizer step, whole (gathered where they are sharded)."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for name, p in pl_module.named_parameters():
            grad = p.grad
            assert grad is not None, name
            self.gradients[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()


def explicit(harmonize: bool = True) -> dict[str, Tensor]:
    """Gradients of the whole step from the formulas: one sample at a time, float64, no Step, no fork."""
    data = content(torch.float64)
    recipe = ToyRecipe().double()
    grads = {name: torch.zeros_like(p) for name, p in recipe.named_parameters()}
    parameters = dict(recipe.named_parameters())
    present: Mapping[str, Tensor] = {"a": data["a"], "b": data["b"]}
    for i in range(N):
        z_D = recipe.towers["trunk"](data["x"][i : i + 1]).h_BTD[0, 0]
        leaf = z_D.detach().requires_grad_()
        feature = []
        for name, target in (("a", data["y"][i]), ("b", -data["y"][i])):
            count = present[name].sum()
            value = ((recipe.heads[name](leaf) - target) ** 2).sum() * data["weight"][i] / count * MIX[name]
            value = value if present[name][i] else value * 0
            g_leaf, g_w, g_b = torch.autograd.grad(value, [leaf, *recipe.heads[name].parameters()])
            grads[f"heads.{name}.weight"] += g_w
            grads[f"heads.{name}.bias"] += g_b
            feature.append(g_leaf)
        g_KBD = torch.stack(feature)[:, None]
        g_D = (project_conflicts(g_KBD, ("a", "b")) if harmonize else g_KBD.sum(0))[0]
        trunk = [name for name in parameters if name.startswith("towers")]
        for name, g in zip(trunk, torch.autograd.grad(z_D, [parameters[n] for n in trunk], g_D), strict=True):
            grads[name] += g
    return grads


def lightning_gradients(
    rank: int,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float64,
    strategy: Any = "auto",
    devices: int = 1,
    harmonize: bool = True,
    batch_size: int = N,
    **parts: Any,
) -> dict[str, Tensor]:
    """The same gradients as Lightning's automatic optimization computes them on these ranks.

    A ``batch_size`` above N is filled with rows of padding, which must not be seen.
    """
    keep = KeepGradients()
    recipe = ToyRecipe(harmonize, **parts)
    recipe = recipe.double() if dtype == torch.float64 else recipe.float()
    trainer = L.Trainer(
        devices=devices,
        strategy=strategy,
        max_steps=1,
        accumulate_grad_batches=accumulate,
        callbacks=[keep],
        **QUIET,
    )
    trainer.fit(recipe, datamodule=ToyData(dtype, batch_size))
    return keep.gradients


def largest_gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest entry wanted."""
    names = {name.replace("_orig_mod.", ""): name for name in found}
    assert names.keys() == wanted.keys()
    size = max(float(w.abs().max()) for w in wanted.values())
    return max(float((found[names[n]].double() - w).abs().max()) for n, w in wanted.items()) / size
