"""The contrast inside masked modelling against its formula, sample by sample, and what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.losses.contrastive import InfoNCE
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.masking.alignment import Alignment
from descant.modules.masking.decoders import At, Encoded
from descant.modules.towers.text import BagTower
from descant.modules.towers.vit import Trunk
from descant.recipes import Masked
from tests.tolerance import F64, ulps

B, D = 6, 8
#: Samples 0 and 3 are seen in pixels alone; 1 has a visible word, 2 no pixels, 4 no text, 5 nothing visible.
PIXELS = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
WORDS = torch.tensor([[0, 0], [0, 1], [1, 1], [0, 0], [0, 0], [0, 0]], dtype=torch.bool)
IDS = torch.tensor([[1, 2], [3, 4], [5, 6], [2, 0], [0, 0], [7, 8]])


def align() -> Alignment:
    torch.manual_seed(0)
    made = Alignment("rgb", "text", BagTower(9, 5), width=4, loss=InfoNCE(0.5))
    return made.build(("rgb", "text"), D).double()


def given(ids_BT: Tensor = IDS, seed: int = 1) -> tuple[Encoded, Batch]:
    at = {"rgb": At.of(PIXELS), "text": At.of(WORDS)}
    torch.manual_seed(seed)
    h = {m: torch.randn(len(a.row_N), D, dtype=torch.float64) for m, a in at.items()}
    present = {"rgb": torch.ones(B, dtype=torch.bool), "text": torch.arange(B) != 4}
    return Encoded(h, at, torch.zeros(B, D).double()), Batch({"text": ids_BT}, present)


def test_the_term_is_that_of_samples_that_are_seen_in_one_modality_alone() -> None:
    part, (encoded, batch) = align(), given()
    term = part(encoded, batch)["align/rgb-text"]
    assert term.valid is not None
    assert term.valid.tolist() == [True, False, False, True, False, False]

    def unit(head: torch.nn.Module, h_D: Tensor) -> Tensor:
        z_E = head(h_D)
        return z_E / z_E.square().sum().sqrt()

    a, b = {}, {}
    for n in (0, 3):
        rows = encoded.h["rgb"][encoded.at["rgb"].row_N == n]
        words = [part.tower.embedding.weight[i] for i in IDS[n].tolist() if i]  # type: ignore[union-attr, index]
        a[n], b[n] = unit(part.head_seen, rows.sum(dim=0)), unit(part.head_other, torch.stack(words).mean(dim=0))
    s = part.loss.scale()  # type: ignore[operator]
    for n, other in ((0, 3), (3, 0)):
        same, forth, back = s * a[n] @ b[n], s * a[n] @ b[other], s * a[other] @ b[n]
        wanted = -(F.log_softmax(torch.stack([same, forth]), 0)[0] + F.log_softmax(torch.stack([same, back]), 0)[0]) / 2
        torch.testing.assert_close(term.value[n], wanted, rtol=0, atol=ulps(64, F64))


def test_other_samples_are_no_negatives_and_get_no_gradient() -> None:
    part, (encoded, batch) = align(), given()
    whole = part(encoded, batch)["align/rgb-text"]
    changed = given(torch.where(torch.tensor([0, 1, 1, 0, 1, 1], dtype=torch.bool)[:, None], 8 - IDS, IDS))[1]
    again = part(encoded, changed)["align/rgb-text"]
    assert torch.equal(whole.value[[0, 3]], again.value[[0, 3]])
    encoded.h["rgb"].requires_grad_()
    (part(encoded, batch)["align/rgb-text"].sum()).backward()
    gradient_ND = encoded.h["rgb"].grad
    assert gradient_ND is not None
    counted_N = torch.isin(encoded.at["rgb"].row_N, torch.tensor([0, 3]))
    assert not gradient_ND[~counted_N].any()
    assert gradient_ND[counted_N].any(dim=1).all()


def test_a_batch_in_which_nothing_counts_has_a_finite_term_without_gradient() -> None:
    part, (encoded, batch) = align(), given()
    batch.present["text"] = torch.zeros(B, dtype=torch.bool)
    total = part(encoded, batch)["align/rgb-text"].sum()
    total.backward()
    assert total == 0
    assert all(p.grad is not None and not p.grad.any() for p in part.parameters() if p.requires_grad)


def test_what_does_not_fit_is_refused_by_name() -> None:
    def recipe(part: Alignment, **options: Any) -> Masked:
        two = {m: PatchAdapter([8, 8], 4) for m in ("image", "depth")}
        return Masked(Adapters(image=two["image"], depth=two["depth"]), Trunk(16, 1, 2), align=part, **options)

    with pytest.raises(ValueError, match=r"^align: rgb with itself: two modalities are paired$"):
        Alignment("rgb", "rgb", BagTower(9, 4))
    with pytest.raises(ValueError, match=r"^align: 'depht': .*depth"):
        recipe(Alignment("image", "depht", BagTower(9, 4)))
    with pytest.raises(ValueError, match=r"^chunks 2: tokens of all samples are encoded at once; only 1$"):
        recipe(Alignment("image", "depth", BagTower(9, 4)), chunks=2)
