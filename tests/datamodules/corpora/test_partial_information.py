"""Partial information: parts of the label, noise, ids of the sets, and Bayes accuracies against a full enumeration."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from descant.datamodules.corpora.partial_information import DRAWS, PartialInformation, PartialInformationSet
from descant.modules.core.batch import Batch
from tests.datamodules.batches import shuffled, whole
from tests.tolerance import F32, F64, rounding, statistical, ulps


def data(**options: Any) -> PartialInformation:
    return PartialInformation(**{"batch_size": 16, "samples": 2000, "held_out": 2000, "factors": {"b": 2}, **options})


def rows(held: Any) -> PartialInformationSet:
    assert isinstance(held, PartialInformationSet)
    return held


def signs(held: PartialInformation, batch: Batch, m: str) -> Tensor:
    """``Q_m^T x_m``, float64 ``[N, K]``: the signs with their noise."""
    return batch.inputs[m].double() @ held.maps[m]


def test_a_sample_is_a_function_of_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    first = shuffled(data().training_set(), 32, seed=3)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    again = data(samples=500)
    inputs, targets = again.generate(first.index.numpy())
    assert all(torch.equal(x, inputs[m]) for m, x in first.inputs.items())
    assert all(torch.equal(y, targets[name]) for name, y in first.targets.items())
    assert torch.equal(first.content_id, first.index) and first.inputs["a"].dtype == torch.float32


def test_sets_share_no_id_and_the_lock_box_has_its_own() -> None:
    open_, sealed = data(), data(sealed=True)
    sets = [open_.training_set()]
    sets += [rows(of.evaluation_sets(stage)[name]) for of in (open_, sealed) for stage, name in
             (("validate", "val"), ("test", "test"))]  # fmt: skip
    every = np.concatenate([held.id_N for held in sets])
    assert len(np.unique(every)) == len(every) == 10_000
    for bank in (open_.bank_set(), sealed.bank_set()):
        assert np.array_equal(bank.id_N, sets[0].id_N), "what is trained on does not depend on the lock-box"


def test_a_resumed_epoch_goes_on_at_its_next_batch() -> None:
    held, again = data(drop={"b": 0.3}), data(drop={"b": 0.3})
    batches = list(held.train_dataloader())
    again.position = (0, 3)
    following = next(iter(again.train_dataloader()))
    assert torch.equal(following.index, batches[3].index) and torch.equal(
        following.present["b"], batches[3].present["b"]
    )
    assert torch.equal(following.inputs["b"], batches[3].inputs["b"])
    missing = 1 - torch.cat([batch.present["b"] for batch in batches]).double().mean()
    assert float(missing) == pytest.approx(0.3, abs=statistical(0.46, 2000))


def test_the_label_is_made_of_its_parts_and_the_signs_carry_them() -> None:
    held = data(noise={"a": 1e-3, "b": 1e-3}, unique=1, shared=2, synergy=1)
    batch = whole(held.training_set())
    y, a, b = batch.targets, signs(held, batch, "a") < 0, signs(held, batch, "b") < 0
    assert held.signs == {"a": 4, "b": 7} and len(held.classes["label"]) == 32
    unique_b, shared_b = b[:, 0] ^ b[:, 3], b[:, 1:3] ^ b[:, 4:6]
    assert torch.equal(a[:, 1:3], shared_b), "shared bits are the same, as signs of a and as products of b"
    assert torch.equal(y["unique_a"], a[:, 0].long()) and torch.equal(y["unique_b"], unique_b.long())
    assert torch.equal(y["shared"], 2 * a[:, 1].long() + a[:, 2].long())
    assert torch.equal(y["synergy"], (a[:, 3] ^ b[:, 6]).long())
    assert torch.equal(y["label"], 16 * y["unique_a"] + 8 * y["unique_b"] + 2 * y["shared"] + y["synergy"])
    counts = torch.bincount(y["label"], minlength=32) / 2000
    assert float((counts - 1 / 32).abs().max()) < statistical((31 / 32**2) ** 0.5, 2000)


def test_noise_has_the_deviation_of_its_modality_in_every_direction() -> None:
    held = data(noise={"a": 0.3, "b": 1.5})
    batch = whole(held.training_set())
    for m, std in held.noise.items():
        q_DK = held.maps[m]
        torch.testing.assert_close(q_DK.T @ q_DK, torch.eye(held.signs[m]).double(), **rounding(64, F64))
        beside = batch.inputs[m].double() @ (torch.eye(held.width).double() - q_DK @ q_DK.T)
        count = 2000 * (held.width - held.signs[m])
        variance = float(beside.square().sum()) / count / std**2
        assert variance == pytest.approx(1, abs=statistical(2**0.5, count))
        mean_K = signs(held, batch, m).mean(dim=0)
        assert float(mean_K.abs().max()) < statistical((1 + std**2) ** 0.5, 2000)


def posterior(held: PartialInformation, batch: Batch, given: tuple[str, ...], target: str) -> Tensor:
    """``[N, C]``: p(target | x of the given), by Bayes' rule over all bits and coins, one by one."""
    parts, log = held.parts, list[Tensor]()
    states = [*product((0, 1), repeat=sum(parts.values()) + len(held.noise) - 1)]  # label bits, and parity bits but one
    for state in states:
        bit = dict(zip([*parts, *[f"parity_{m}" for m in list(held.noise)[1:]]], state, strict=True))
        first, *others = held.noise
        bit[f"parity_{first}"] = (bit["synergy"] + sum(bit[f"parity_{m}"] for m in others)) % 2
        log_N = torch.zeros(len(batch), dtype=torch.float64)
        for m in given:
            y_NK, whole_bits = signs(held, batch, m), [bit[f"unique_{m}"], bit["shared"]]
            coins = [*product((0, 1), repeat=len(whole_bits) * (held.factors[m] - 1))]
            each = []
            for coin in coins:
                last = [(b + sum(coin[k :: len(whole_bits)])) % 2 for k, b in enumerate(whole_bits)]
                s_K = 1 - 2 * torch.tensor([*last, *coin, bit[f"parity_{m}"]]).double()
                each.append(-(y_NK - s_K).square().sum(dim=1) / (2 * held.noise[m] ** 2))
            log_N = log_N + torch.stack(each).logsumexp(dim=0)
        log.append(log_N)
    p_SN = torch.stack(log).softmax(dim=0)
    names = [*parts] if target == "label" else [target]
    places = [[*parts].index(name) for name in names]
    class_S = torch.tensor([int("".join(str(state[k]) for k in places), 2) for state in states])
    return torch.zeros(2 ** len(names), len(batch)).double().index_add(0, class_S, p_SN).T


@pytest.mark.parametrize("factors", [{}, {"b": 2}, {"a": 2, "b": 3}])
def test_bayes_accuracies_are_those_of_the_enumerated_posterior(factors: dict[str, int]) -> None:
    held = data(noise={"a": 0.7, "b": 0.9}, factors=factors)
    batch = whole(held.training_set())
    for given, target in product([("a",), ("b",), ("a", "b")], ["label", "unique_a", "unique_b", "shared", "synergy"]):
        p_NC, bayes = posterior(held, batch, given, target), held.bayes(*given, target=target)
        # the mean of the largest posterior is that of the best decision's accuracy, and varies less than its hits
        best_N, choice_N = p_NC.max(dim=1)
        drawn = statistical(0.5, DRAWS) if factors else 0.0
        rounded = ulps(64, F32)  # of the inputs, where a posterior is 1/2 for all
        bound = statistical(float(best_N.std()), len(batch)) + drawn + rounded
        assert float(best_N.mean()) == pytest.approx(bayes, abs=bound), (given, target)
        if bayes > 1.01 / p_NC.shape[1]:  # else all decisions are equally good
            hits = float((choice_N == batch.targets[target]).double().mean())
            assert hits == pytest.approx(bayes, abs=statistical(0.5, len(batch)) + drawn), (given, target)
    assert held.bayes() == held.bayes("b", "a") > max(held.bayes("a"), held.bayes("b"))


def test_three_modalities_and_a_part_that_is_left_out() -> None:
    held = data(noise={"x": 0.3, "y": 0.3, "z": 0.3}, factors={}, unique=0, shared=0, synergy=2)
    batch = whole(held.training_set())
    assert held.modalities == ("x", "y", "z") and set(batch.targets) == {"label", "synergy"}
    bits = torch.stack([signs(held, batch, m) < 0 for m in held.modalities]).sum(dim=0) % 2
    assert float((2 * bits[:, 0] + bits[:, 1] == batch.targets["label"]).double().mean()) > 0.98
    assert held.bayes("x", "y") == 0.25 and held.bayes() > 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": {"a": 0.0}, "factors": {}}, "noise: a 0: above 0, such as 0.3"),
        ({"factors": {"c": 2}}, "factors: 'c' is not one of a, b"),
        ({"factors": {"b": 0}}, "factors: b 0: 1 is the least"),
        ({"shared": -1}, "shared -1: 0 is the least"),
        ({"samples": 0}, "samples 0: 1 is the least"),
        ({"unique": 0, "shared": 0, "synergy": 0}, "0 bits of the label; 1 to 12"),
        ({"shared": 11}, "14 bits of the label; 1 to 12"),
        ({"width": 4}, "width 4: a modality carries 5 signs; at least that"),
        ({"drop": {"c": 0.1}}, "drop: no modality 'c'; this data has a, b"),
    ],
)
def test_options_out_of_range_raise_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**options)


def test_unknown_names_are_no_bayes_accuracy() -> None:
    with pytest.raises(ValueError, match="given: 'c' is not one of a, b"):
        data().bayes("c")
    with pytest.raises(ValueError, match="target: 'shade' is not one of label, unique_a, unique_b, shared, synergy"):
        data().bayes(target="shade")
