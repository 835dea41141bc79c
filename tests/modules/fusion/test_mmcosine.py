"""MMCosine against an explicit loop in double precision, values and gradients, and what balances it: norms."""

from __future__ import annotations

import math

import pytest
import torch

from descant.modules.fusion.mmcosine import MMCosine
from tests.modules.fusion.test_classifiers import WIDTHS, built, latents, presence
from tests.tolerance import F64, ulps


def test_logits_and_shares_are_the_loop_over_samples_and_classes() -> None:
    fusion, z, present = built(lambda: MMCosine(scale=7.0)), latents(), presence()
    logits_BC, shares = fusion(z, present), fusion.parts(z, present)
    for b in range(7):
        for k in range(4):
            total = 0.0
            for m in WIDTHS:
                w, x = fusion.get_parameter(f"maps.{m}.weight")[k].tolist(), z[m][b].tolist()
                dot = math.fsum(a * c for a, c in zip(w, x, strict=True))
                cosine = dot / math.sqrt(math.fsum(a * a for a in w) * math.fsum(c * c for c in x))
                share = 7.0 * cosine * float(present[m][b])
                assert float(shares[m][b, k]) == pytest.approx(share, abs=7 * ulps(16, F64))
                total += share
            assert float(logits_BC[b, k]) == pytest.approx(total, abs=21 * ulps(16, F64))


def test_gradients_are_orthogonal_to_features_and_blind_to_their_norm() -> None:
    """d cos / d z = (w / |w| - cos z / |z|) / |z|: the logit is the same for a longer feature."""
    fusion, present = built(MMCosine), presence()
    z = {m: x.requires_grad_() for m, x in latents().items()}
    grads = torch.autograd.grad(fusion(z, present)[:, 0].sum(), list(z.values()))
    for m, grad_BD in zip(WIDTHS, grads, strict=True):
        w_D = fusion.get_parameter(f"maps.{m}.weight")[0]
        size_B1 = z[m].norm(dim=1, keepdim=True)
        unit_BD = z[m] / size_B1
        wanted_BD = 10 * (w_D / w_D.norm() - (unit_BD @ w_D)[:, None] / w_D.norm() * unit_BD) / size_B1
        wanted_BD = torch.where(present[m][:, None], wanted_BD, 0.0)
        # features of length down to 0.5, so gradients up to 20 of terms of that size
        torch.testing.assert_close(grad_BD, wanted_BD, rtol=0, atol=20 * ulps(64, F64))
    longer = {m: 100 * x for m, x in z.items()}
    torch.testing.assert_close(fusion(longer, present), fusion(z, present), rtol=0, atol=30 * ulps(16, F64))


def test_a_scale_is_above_zero() -> None:
    with pytest.raises(ValueError, match="MMCosine: scale 0: above 0, such as 10"):
        MMCosine(scale=0.0)
