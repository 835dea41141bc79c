"""One stage by mutual information: the step against an explicit loop, its special cases, places and mixtures.

Letters: B samples, T patches, Q places, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.base import BatchDataset, Rows
from descant.modules.core.batch import Batch
from descant.modules.losses import InfoNCE
from descant.modules.losses.information import Boltzmann, Normal, normal_loss, softmax_loss
from descant.modules.losses.views import SimCLR, Views
from descant.modules.masking.adapters import MSE, PatchAdapter
from descant.modules.masking.patch_mix import PatchMix
from descant.modules.masking.view_decoder import ViewDecoder
from descant.modules.towers import PatchTower, TextTower, Towers
from descant.modules.transforms.crops import CropBox
from descant.recipes import MutualInformation
from tests._suites import GradientExact, MissingModalities, Ranks, Resume, SampleData, Samples
from tests.tolerance import F64, ulps

T, C = 4, 3


def images(index_N: np.ndarray, view: int = 1) -> Tensor:
    """A picture of each sample, float64 ``[N, 3, 4, 4]``."""
    made = [torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(int(i) + 99 * view)) for i in index_N]
    return torch.stack(made).double()


class Pictures(Samples):
    """Two views of pictures and token ids in place of vectors."""

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        lacks_B111 = ~self.has["image"][torch.from_numpy(index_B)][:, None, None, None]
        x, x_2 = (images(index_B, view).masked_fill(lacks_B111, torch.nan) for view in (1, 2))
        ids_BT = torch.from_numpy(np.stack([index_B % 5 + 1, index_B % 7 + 1, 0 * index_B + 2], axis=1))
        label_B = self.label_N[torch.from_numpy(index_B)]
        label_B = torch.where(torch.from_numpy(index_B) == 4, -1, label_B)  # one without a label
        return Rows({"image": x, "image@2": x_2, "text": ids_BT}, {"group": label_B}, torch.from_numpy(index_B))


class PictureData(SampleData):
    def training_set(self) -> BatchDataset:
        return Pictures(self.count, self.names)


def recipe(scale: tuple[float, float] = (1.0, 1.0), **options: Any) -> MutualInformation:
    torch.manual_seed(0)
    towers = Towers(image=PatchTower(4, 2, 8, 1, 2), text=TextTower(9, 8, 1, 2, 3))
    parts: dict[str, Any] = dict(same=Normal(), view=Boltzmann(), text=Boltzmann(0.5), classes=C)
    return MutualInformation(towers, PatchMix(2, 0.75), ViewDecoder(8, 1, 2), **(parts | options), width=8, scale=scale)


class TestM3I(GradientExact, Ranks, MissingModalities, Resume):
    def recipe(self) -> MutualInformation:
        return recipe()

    def batch(self) -> Batch:
        data, at = Pictures(16, ("image", "text")), np.arange(16)
        rows = data.rows(at, at)
        key_B = torch.arange(16)
        key_B[5] = key_B[6]  # equal content: no negatives of each other
        draw_B = torch.arange(16) * 7919 + 13
        return Batch(rows.inputs, data.present(at), rows.targets, content_id=key_B, rng_seed=draw_B)

    def data(self) -> SampleData:
        return PictureData(modalities=("image", "text"))

    def made(self) -> Any:
        model: Any = self.recipe().double().train()
        model.distill.prepare(model)
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():  # a teacher that is not what the student is
            for p in model.distill.network.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        return model

    def explicit(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Sample by sample; which patches and which second image are the pieces' own, tested apart."""
        here, both = batch.present["image"], batch.both("image", "text")
        mixture = model.patch_mix(batch.inputs["image"].nan_to_num(), batch.rng_seed, here)
        m, second, rows = mixture.share, mixture.source_B.tolist(), here.nonzero()[:, 0].tolist()
        grid = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
        same, view, classes, z, t = [], [], [], {}, {}
        for b in rows:
            x, shown = batch.inputs["image"], mixture.first_BT[b]
            mixed = x[b].clone()
            for i in range(T):
                if not shown[i]:
                    y, c = 2 * (i // 2), 2 * (i % 2)
                    mixed[:, y : y + 2, c : c + 2] = x[second[b]][:, y : y + 2, c : c + 2]
            tokens = model.towers["image"](mixed[None])

            def asked(tokens: Any, mask: Tensor, places: Tensor) -> Tensor:
                return model.decoder(tokens._replace(mask_BT=mask[None]), places[None])[0]

            def taught(x: Tensor) -> Tensor:
                with torch.no_grad():
                    h = model.distill.network.towers["image"](x[None]).h_BTD[0]
                return (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()

            hidden = (~shown).nonzero()[:, 0]
            same.append((asked(tokens, shown, grid[hidden]) - taught(x[b])[hidden]).square().mean())
            p = F.normalize(asked(tokens, ~shown, grid), dim=1)
            aim = F.normalize(taught(batch.inputs["image@2"][second[b]]), dim=1)
            view.append(F.cross_entropy(model.view.scale() * p @ aim.T, torch.arange(T)))
            h = tokens.h_BTD[0].mean(0)
            log_p = model.label_head(h[None])[0].log_softmax(0)
            labels = batch.targets["group"]
            shares = [(m, labels[b]), (1 - m, labels[second[b]])]
            classes.append(torch.stack([-w * log_p[y] for w, y in shares if y >= 0] or [log_p.sum() * 0]).sum())
            if both[b]:
                z[b] = F.normalize(model.heads["image"](h[None]), dim=1)[0]
                text = model.pools["text"](model.towers["text"](batch.inputs["text"][b : b + 1]))
                t[b] = F.normalize(model.heads["text"](text), dim=1)[0]
        return {
            "same": torch.stack(same).mean(),
            "view": torch.stack(view).mean(),
            "text": self.text_loss(model.text.scale(), z, t, second, batch.content_id.tolist(), m),
            "classes": torch.stack(classes).mean(),
        }

    @staticmethod
    def text_loss(
        scale: Tensor, z: dict[int, Tensor], t: dict[int, Tensor], second: list[int], key: list[int], m: float
    ) -> Tensor:
        values = []
        for b in z:
            for rows, columns, fit in ((z[b], t, [b, second[b]]), (t[b], z, [b, *(g for g in z if second[g] == b)])):
                keys = {key[g] for g in fit} if columns is t else None
                mine = [g for g in columns if g in fit]
                others = [
                    g
                    for g in columns
                    if g not in fit
                    and (key[g] not in keys if keys is not None else key[b] not in (key[g], key[second[g]]))
                ]
                total = torch.stack([scale * rows @ columns[g] for g in mine + others]).logsumexp(0)
                share = {g: m if g == b else 1 - m for g in mine}
                values.append(
                    torch.stack([w * (total - scale * rows @ columns[g]) for g, w in share.items()]).sum() / 2
                )
        return torch.stack(values).sum() / len(z)


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_configured_down_it_is_clip() -> None:
    a_BD, b_BD = (F.normalize(random(6, 4, seed=s), dim=1) for s in (1, 2))
    wanted_B = InfoNCE(0.2).double()(a_BD, b_BD, torch.arange(6), torch.ones(6, dtype=torch.bool))
    eye, logits = torch.eye(6, dtype=torch.float64), 5 * a_BD @ b_BD.T
    found_B = (softmax_loss(logits, eye) + softmax_loss(logits.T, eye)) / 2
    assert float((found_B - wanted_B).abs().max()) < 1e-6  # of the issue: the temperature is a float32 logarithm


def test_configured_down_it_is_simclr() -> None:
    h = [random(5, 8, seed=s) for s in (1, 2)]
    loss = SimCLR(8, 4, temperature=0.5).build(8).double().train()
    valid_B = torch.ones(5, dtype=torch.bool)
    wanted = loss(Views(h, torch.arange(5), valid_B, []))
    z = F.normalize(torch.cat([loss.projector(v) for v in h]), dim=1)
    share = torch.eye(10, dtype=torch.float64).roll(5, dims=0)
    found = softmax_loss(z @ z.T / 0.5, share, torch.eye(10, dtype=torch.bool)).view(2, 5).mean(dim=0)
    assert float((found - wanted).abs().max()) < ulps(256, F64)


def test_configured_down_it_is_masked_autoencoding() -> None:
    adapter = PatchAdapter([4, 4], 2, losses=[MSE()])
    adapter.build(8, 6)
    adapter.double()
    x_NP, h_NE, place_N = (
        adapter.raw(images(np.arange(2)))[0].flatten(0, 1),
        random(2 * T, 6),
        torch.arange(T).repeat(2),
    )
    raw_NP = adapter.predict(h_NE, place_N)
    found_N, (wanted_N,) = normal_loss(raw_NP, x_NP), adapter.losses(h_NE, x_NP, place_N).values()
    assert float((found_N - (raw_NP - x_NP).square().mean(1)).abs().max()) < ulps(16, F64)
    assert float((found_N - wanted_N).abs().max()) < 1e-6  # of the issue: losses of pixels are in float32


def test_configured_down_it_is_classification() -> None:
    logits, label = random(6, C), torch.arange(6) % C
    wanted = F.cross_entropy(logits, label, reduction="none")
    assert float((softmax_loss(logits, F.one_hot(label, C).double()) - wanted).abs().max()) < ulps(16, F64)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_mixed_target_moves_by_what_is_mixed(share: float) -> None:
    """With share m of the first image, the gradient of the logit of the second's class is 1 - m of a whole target's."""
    logits = random(1, C).requires_grad_()
    own, other = torch.eye(C, dtype=torch.float64)[:2]
    (moved,) = torch.autograd.grad(softmax_loss(logits, (share * own + (1 - share) * other)[None]).sum(), logits)
    (whole,) = torch.autograd.grad(softmax_loss(logits, own[None]).sum(), logits)
    assert float((moved - whole - (1 - share) * (own - other)).abs().max()) < ulps(8, F64)


def test_exactly_the_share_of_patches_is_of_the_first_image() -> None:
    x, draw_B = random(9, 3, 8, 8), torch.arange(9) * 31
    valid_B = torch.arange(9) != 4
    mixture = PatchMix(4, 0.3)(x, draw_B, valid_B)
    assert mixture.first_BT.sum(dim=1).tolist() == [5] * 9 and mixture.share == 5 / 16
    assert sorted(mixture.source_B.tolist()) == [*range(9)] and mixture.source_B[4] == 4
    assert (mixture.source_B != torch.arange(9)).sum() == 8
    assert not mixture.first_BT.gather(1, mixture.hidden_BQ).any() and mixture.hidden_BQ.shape == (9, 11)


def test_a_query_outside_the_crop_asks_for_the_right_patch() -> None:
    """Each patch of one crop, at its place counted in those of another, is the same pixel of the image."""
    draw_B = torch.arange(50) * 17
    like = torch.zeros(50, dtype=torch.float64)
    seen, other = (CropBox.draw(draw_B, name, (0.1, 1.0), like) for name in ("a", "b"))
    place_BT2 = other.places(seen, 4)
    assert (place_BT2 < -0.5).any() and (place_BT2 > 3.5).any()
    for b in range(50):
        for i in range(16):
            pixel = []
            for crop, (row, column) in ((seen, place_BT2[b, i].tolist()), (other, (i // 4, i % 4))):
                side, (x, y) = float(crop.side_B[b]), ((crop.centre_B2[b] + 1) / 2).tolist()
                pixel += [y + side * ((row + 0.5) / 4 - 0.5), x + side * ((column + 0.5) / 4 - 0.5)]
            assert max(abs(pixel[0] - pixel[2]), abs(pixel[1] - pixel[3])) < ulps(64, F64)


def test_a_crop_is_that_part_of_the_image() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8)
    lower_right = CropBox(torch.tensor([0.5]), torch.tensor([[0.5, 0.5]]))
    assert torch.equal(lower_right.of(x, 4), x[:, :, 4:, 4:])


def test_the_average_holds_the_image_tower_alone() -> None:
    model = TestM3I().made()
    teacher = model.distill.network
    assert {name.split(".")[0] for name, _ in teacher.named_parameters()} == {"towers"}
    assert set(teacher.towers) == {"image"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(same=None, view=None, text=None, classes=None), "no term: give some of same, view, text and classes"),
        (dict(distill="teacher"), "distill: MutualInformation has a teacher of its own"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_a_tower_of_other_tokens_and_data_of_one_view_are_refused() -> None:
    batch = TestM3I().batch()
    one_view = replace(batch, inputs={m: x for m, x in batch.inputs.items() if m != "image@2"})
    with pytest.raises(ValueError, match=r"the data has no 'image@2': data.views \{image: 2\}"):
        recipe().double()(one_view)
    coarse = Towers(image=PatchTower(4, 4, 8, 1, 2), text=TextTower(9, 8, 1, 2, 3))
    model = MutualInformation(coarse, PatchMix(2), ViewDecoder(8, 1, 2), same=Normal()).double()
    with pytest.raises(ValueError, match="patch_mix: 2 patches a side, and 1 tokens"):
        model(batch)
