"""Synthetic modalities with known unique, shared and synergistic information on a label, and its Bayes accuracy.

Letters: B samples of a batch, N of a set or of draws, M modalities, D numbers of a modality, K signs that one carries,
P bits of a part of the label.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, reduce
from math import erf, prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule, NumberedDataset, Rows
from descant.datamodules.names import require_known
from descant.modules.core.errors import require_value
from descant.modules.core.rng import salt, uniform_NK

#: First id of each set; those of the lock-box replace validation and test.
FIRST = {"train": 0, "val": 1 << 32, "test": 2 << 32, "sealed_val": 5 << 32, "sealed_test": 6 << 32}
LABEL, MOST_BITS, DRAWS = "label", 12, 1 << 18


class PartialInformationSet(NumberedDataset):
    """Samples of a :class:`PartialInformation` by their ids ``id_N``."""

    def __init__(self, data: PartialInformation, id_N: np.ndarray, drop: Mapping[str, float] | None = None) -> None:
        super().__init__(data.seed, drop)
        self.modalities, self.id_N = data.modalities, id_N
        self.inputs, self.targets = data.generate(id_N)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        at_B, id_B = torch.from_numpy(index_B), torch.from_numpy(self.id_N[index_B])
        inputs = {m: x_ND[at_B] for m, x_ND in self.inputs.items()}
        return Rows(inputs, {name: y_N[at_B] for name, y_N in self.targets.items()}, id_B)


class PartialInformation(DataModule):
    """Synthetic vectors whose unique, shared and synergistic bits make the label, with its Bayes accuracy.

        x_m = Q_m s_m + noise_m e,      s_m in {-1, 1}^K,   Q_m fixed and orthonormal,   e standard normal
        label = unique bits of each modality, shared bits, and parities over all modalities, as one binary number

    A unique or shared bit is the product of ``factors_m`` signs in s_m, all but one of them fair coins. With 1 sign it
    can be read off linearly; with 2 it is an XOR that is slow to learn. Shared bits are the same in all modalities.
    Parity j is the XOR of one bit of each modality, each a sign; only all modalities together reveal it.

    A sample is a pure function of its id. Targets: ``label`` and each part of it, ``unique_{modality}``, ``shared`` and
    ``synergy``. Evaluation sets: "validate" has ``val``, "test" has ``test``.
    Source: the parts as in partial information decomposition (Williams 2010, arXiv 1004.2515).

    Args:
        noise: modality -> standard deviation of its noise; {a: 0.3, b: 0.4} by default.
        factors: modality -> signs of a unique or shared bit; 1 by default.
        width: D.
        unique, shared, synergy: bits of each part; ``unique`` bits for each modality.
        samples: number of training samples.
        held_out: number of samples in an evaluation set.
        sealed: use the evaluation sets of the lock-box, whose samples have their own ids.
        kwargs: arguments of every data module.

    >>> data = PartialInformation({"a": 0.3, "b": 1.0}, unique=1, shared=0, synergy=0, tiny=True)
    >>> [round(data.bayes(*given), 3) for given in (("a",), ("b",), ("a", "b"))]  # the bit of the other is guessed
    [0.5, 0.421, 0.841]
    """

    def __init__(
        self,
        noise: dict[str, float] | None = None,
        factors: dict[str, int] | None = None,
        width: int = 16,
        unique: int = 1,
        shared: int = 1,
        synergy: int = 1,
        samples: int = 8192,
        held_out: int = 4096,
        sealed: bool = False,
        **kwargs: Any,
    ) -> None:
        self.noise = noise or {"a": 0.3, "b": 0.4}
        super().__init__(**kwargs)
        self.width, self.unique, self.shared, self.synergy = width, unique, shared, synergy
        self.samples, self.held_out, self.sealed = samples, held_out, sealed
        if self.tiny:
            self.samples, self.held_out = min(samples, 256), min(held_out, 64)
        require_known("factors", list(factors or {}), self.modalities)
        self.factors = {m: (factors or {}).get(m, 1) for m in self.noise}
        for m, std in self.noise.items():
            require_value(std > 0, f"noise: {m} {std:g}: above 0, such as 0.3")
        least = {"unique": 0, "shared": 0, "synergy": 0, "samples": 1, "held_out": 1}
        counts = {name: getattr(self, name) for name in least} | {f"factors: {m}": n for m, n in self.factors.items()}
        for what, count in counts.items():
            if count < least.get(what, 1):
                raise ValueError(f"{what} {count}: {least.get(what, 1)} is the least")
        bits = sum(self.parts.values())
        require_value(1 <= bits <= MOST_BITS, f"unique, shared, synergy: {bits} bits of the label; 1 to {MOST_BITS}")
        signs = max(self.signs.values())
        require_value(signs <= width, f"width {width}: a modality carries {signs} signs; at least that")

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.noise)

    @property
    def parts(self) -> dict[str, int]:
        """Return part of the label -> its number of bits, in the order of the label's digits."""
        parts = {**{f"unique_{m}": self.unique for m in self.noise}, "shared": self.shared, "synergy": self.synergy}
        return {name: count for name, count in parts.items() if count}

    @property
    def classes(self) -> dict[str, list[str]]:
        bits = {LABEL: sum(self.parts.values()), **self.parts}
        return {name: [f"{i:0{count}b}" for i in range(2**count)] for name, count in bits.items()}

    # samples -----------------------------------------------------------------------------------------------------

    @property
    def signs(self) -> dict[str, int]:
        """Return modality -> K."""
        return {m: each * (self.unique + self.shared) + self.synergy for m, each in self.factors.items()}

    @cached_property
    def maps(self) -> dict[str, Tensor]:
        """Return modality -> ``Q_DK``, float64 with orthonormal columns."""
        rows_D = np.arange(self.width)
        return {m: torch.linalg.qr(_normal(rows_D, count, f"map/{m}"))[0] for m, count in self.signs.items()}

    def generate(self, id_N: np.ndarray) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Generate inputs, float32 ``[N, D]`` by modality, and targets, int64 ``[N]`` by name, of samples by id."""
        unique = {m: _bits(id_N, self.unique, f"unique/{m}") for m in self.noise}
        parity = {m: _bits(id_N, self.synergy, f"synergy/{m}") for m in self.noise}
        shared_NP = _bits(id_N, self.shared, "shared")
        inputs = {}
        for m, std in self.noise.items():
            whole_NP = torch.cat([unique[m], shared_NP], dim=1)
            coins = [_bits(id_N, whole_NP.shape[1], f"factor{k}/{m}") for k in range(1, self.factors[m])]
            last_NP = torch.stack([whole_NP, *coins]).sum(dim=0) % 2
            s_NK = 1 - 2 * torch.cat([last_NP, *coins, parity[m]], dim=1).double()
            inputs[m] = (s_NK @ self.maps[m].T + std * _normal(id_N, self.width, f"noise/{m}")).float()
        synergy_NP = torch.stack(list(parity.values())).sum(dim=0) % 2
        bits = {**{f"unique_{m}": x_NP for m, x_NP in unique.items()}, "shared": shared_NP, "synergy": synergy_NP}
        bits = {LABEL: torch.cat(list(bits.values()), dim=1), **{name: bits[name] for name in self.parts}}
        return inputs, {name: _number(bits_NP) for name, bits_NP in bits.items()}

    def bayes(self, *given: str, target: str = LABEL) -> float:
        """Compute the Bayes accuracy, that of the best decision on ``target`` from the modalities ``given`` (or all).

        For one bit, with ``c_m = 2 Phi(1 / noise_m) - 1`` and ``L_m`` the log-odds of the bit from x_m alone:

            unique of m: (1 + c_m^factors_m) / 2     synergy: (1 + prod_m c_m) / 2     shared: P(sum over given L_m > 0)

        and 1/2 if a modality that it needs is not given. Bits are independent, so a target of several bits has the
        product. The shared one is ``Phi(sqrt(sum noise_m^-2))`` if all factors are 1, otherwise it comes from 2^18
        fixed draws.
        """
        require_known("given", given, self.modalities)
        require_known("target", [target], [LABEL, *self.parts])
        seen = {m: std for m, std in self.noise.items() if m in (given or self.noise)}
        certainty = {m: 2 * _phi(1 / std) - 1 for m, std in seen.items()}
        bit = {f"unique_{m}": (1 + c ** self.factors[m]) / 2 for m, c in certainty.items()}
        if self.shared:
            bit["shared"] = self._shared_bayes(seen)
        if len(seen) == len(self.noise):
            bit["synergy"] = (1 + prod(certainty.values())) / 2
        parts = {name: count for name, count in self.parts.items() if target in (LABEL, name)}
        return prod(bit.get(name, 0.5) ** count for name, count in parts.items())

    def _shared_bayes(self, seen: Mapping[str, float]) -> float:
        if all(self.factors[m] == 1 for m in seen):
            return _phi(sqrt(sum(std**-2 for std in seen.values())))
        total_N = torch.zeros(DRAWS, dtype=torch.float64)
        for m, std in seen.items():  # all signs may be 1: flipping two together changes neither bit nor odds
            draws = torch.Generator().manual_seed(salt(f"partial/bayes/{m}"))
            y_KN = 1 + std * torch.randn(self.factors[m], DRAWS, generator=draws, dtype=torch.float64)
            total_N += reduce(_product_odds, 2 * y_KN / std**2)
        return float((total_N > 0).double().mean())

    # sets --------------------------------------------------------------------------------------------------------

    def _set(self, name: str, count: int, drop: Mapping[str, float] | None = None) -> PartialInformationSet:
        return PartialInformationSet(self, FIRST[name] + np.arange(count), drop)

    def training_set(self) -> PartialInformationSet:
        return self._set("train", self.samples, self.drop)

    def bank_set(self) -> PartialInformationSet:
        return self._set("train", self.samples)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        name = "val" if stage == "validate" else "test"
        return {name: self._set(f"sealed_{name}" if self.sealed else name, self.held_out)}


def _bits(id_N: np.ndarray, count: int, purpose: str) -> Tensor:
    """Draw fair 0 and 1, int64 ``[N, count]``."""
    return (uniform_NK(id_N, [f"partial/{purpose}/{k}" for k in range(count)]) < 0.5).long()


def _normal(id_N: np.ndarray, count: int, purpose: str) -> Tensor:
    """Draw independent standard normal numbers, float64 ``[N, count]``."""
    u_NK = uniform_NK(id_N, [f"partial/{purpose}/{k}" for k in range(count)])
    return torch.special.ndtri(u_NK.double() + 2.0**-25)


def _number(bits_NP: Tensor) -> Tensor:
    return (bits_NP << torch.arange(bits_NP.shape[1]).flip(0)).sum(dim=1)


def _phi(x: float) -> float:
    return (1 + erf(x / sqrt(2))) / 2


def _product_odds(a_N: Tensor, b_N: Tensor) -> Tensor:
    """Compute log-odds that a product of two signs is 1, from those of each: ``2 artanh(tanh(a / 2) tanh(b / 2))``."""
    return torch.logaddexp(torch.zeros_like(a_N), a_N + b_N) - torch.logaddexp(a_N, b_N)
