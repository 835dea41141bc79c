"""LoRA and DoRA: low-rank adapters on the linear layers of frozen towers (peft)."""

from __future__ import annotations

import re
from typing import cast

from torch import nn

from descant.modules.adaptation.base import LM, Adapt, ends_with, keep_norms_in_eval, select_towers
from descant.modules.adaptation.quantize import no_kernels
from descant.modules.moe import ModalityLinear
from descant.modules.towers.base import Frozen


class Lora(Adapt):
    """Low-rank adapters (LoRA; Hu 2021): ``W x + (alpha / r) B A x``, with B = 0 at the start.

    The adapted tower starts unchanged. All of it except A and B is frozen, including running statistics of batch norms.

    Args:
        r: rank.
        alpha: the update is scaled by alpha / r.
        targets: ends of the names of layers to adapt, such as [qkv, mlp.0]; or a regular expression for whole names;
            or all-linear.
        dropout: dropout on the adapter's input.
        dora: train the norm of each output's weights separately from their direction (DoRA; Liu 2024).
        towers: names of the towers to adapt; by default all that are not frozen.

    >>> from descant.modules.towers import TextTower, Towers
    >>> recipe = nn.Module()
    >>> recipe.towers = Towers(text=TextTower(vocab=9, width=8, depth=1, heads=2, length=4))
    >>> Lora(r=2, targets=["qkv"]).apply(recipe)
    >>> sum(p.numel() for p in recipe.parameters() if p.requires_grad)
    64
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16.0,
        targets: list[str] | str = "all-linear",
        dropout: float = 0.0,
        dora: bool = False,
        towers: list[str] | None = None,
    ) -> None:
        if r < 1:
            raise ValueError(f"r {r}: the rank of an adapter is at least 1")
        self.r, self.alpha, self.targets, self.dropout, self.dora = r, alpha, targets, dropout, dora
        self.towers = towers

    def apply(self, recipe: nn.Module) -> None:
        with no_kernels():  # importing peft imports bitsandbytes
            from peft import LoraConfig, inject_adapter_in_model

        for name, tower in select_towers(recipe, self.towers, LM):
            if isinstance(tower, Frozen):
                raise ValueError(f"towers {name}: it is Frozen, adapters would not train; LoRA freezes by itself")
            config = LoraConfig(
                r=self.r,
                lora_alpha=cast(int, self.alpha),
                # one expression of whole names: peft would match "0" with every layer whose name ends in ".0"
                target_modules="|".join(re.escape(layer) for layer in _targets(tower, self.targets)),
                lora_dropout=self.dropout,
                use_dora=self.dora,
            )
            inject_adapter_in_model(config, tower)
            for parameter_name, parameter in tower.named_parameters():
                parameter.requires_grad_("lora_" in parameter_name)
            keep_norms_in_eval(tower)


def _targets(tower: nn.Module, targets: list[str] | str) -> list[str]:
    """Return the full names of the layers to adapt."""
    types = nn.Linear if targets == "all-linear" else (nn.Linear, nn.Conv2d, nn.Embedding)
    bare = getattr(tower, "bare", ())
    layers = [(name, m) for name, m in tower.named_modules() if isinstance(m, types) and name not in bare]
    names = [name for name, module in layers if not isinstance(module, ModalityLinear)]  # adapters ignore kinds
    cls = type(tower).__name__
    if targets == "all-linear":
        if not names:
            raise ValueError(f"targets 'all-linear': {cls} has no linear layer; name convolutions instead")
        return names
    if isinstance(targets, str):
        matches = [name for name in names if re.fullmatch(targets, name)]
        if not matches:
            raise ValueError(f"targets {targets!r} matches no layer of {cls}; one is {names[0]!r}")
        return matches
    return list(dict.fromkeys(name for end in targets for name in ends_with(names, end, "targets", cls)))
