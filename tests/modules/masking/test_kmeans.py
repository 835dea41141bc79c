"""Codes of patches by k-means. Letters: B samples, T codes, N patches, P numbers of a patch, K codes, L layers."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import Adapters
from descant.modules.masking.code_adapter import CodeAdapter
from descant.modules.masking.corruptions import Hide
from descant.modules.masking.discrete_adapters import TokenAdapter
from descant.modules.masking.kmeans import KMeansPatches
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup.trainer import fit_tokenizers
from descant.recipes import Masked
from tests.tolerance import F32, ulps


def pictures(rows: int = 40, seed: int = 0) -> Tensor:
    """Pictures of flat patches in one of six colours, with a little noise."""
    g = torch.Generator().manual_seed(seed)
    colour_63 = torch.rand(6, 3, generator=g) * 2 - 1
    at_B44 = torch.randint(0, 6, (rows, 4, 4), generator=g)
    x_BCHW = colour_63[at_B44].permute(0, 3, 1, 2).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return x_BCHW + 0.05 * torch.randn(x_BCHW.shape, generator=g)


def tokenizer(layers: int = 2, fitted: bool = True) -> KMeansPatches:
    made = KMeansPatches(size=[8, 8], patch=2, codes=8, layers=layers, samples=40)
    if fitted:
        made.fit(pictures())
    return made


def test_codes_in_blocks_of_disjoint_ids_and_an_error_that_falls_by_layer() -> None:
    x_BCHW, errors = pictures(seed=0), []
    for layers in (1, 2, 3):
        made = tokenizer(layers)
        code_BT = made.encode(x_BCHW)
        assert code_BT.shape == (40, made.length) and made.length == 16 * layers and made.vocabulary == 8 * layers
        for layer, block in enumerate(code_BT.split(16, dim=1)):
            assert int(block.min()) >= 8 * layer and int(block.max()) < 8 * (layer + 1)
        errors.append(float((made.decode(code_BT) - x_BCHW).square().mean()))
    assert errors[0] > errors[1] > errors[2] and errors[0] < 0.1 * float(x_BCHW.var())
    centres = tokenizer(1)
    exact = centres.decode(torch.arange(16).remainder(8)[None])
    assert torch.equal(centres.decode(centres.encode(exact)), exact)


def test_weights_make_the_codes_and_the_digest() -> None:
    made, other = tokenizer(), tokenizer(fitted=False)
    with pytest.raises(ValueError, match="KMeansPatches: not fitted"):
        other.encode(pictures())
    before = other.digest()
    other.load_state_dict(made.state_dict())
    assert other.fitted and other.digest() == made.digest() != before
    assert torch.equal(other.encode(pictures(seed=1)), made.encode(pictures(seed=1)))
    assert tokenizer(1).digest() != made.digest() and not other.train().training


def test_padding_stays_padding_in_every_layer() -> None:
    made = KMeansPatches(size=[4, 6], patch=[4, 2], channels=1, codes=2, layers=2, padded=True)
    x_BFT = torch.randn(3, 4, 6)
    x_BFT[1, :, 2:] = -torch.inf
    made.fit(x_BFT)
    assert made.real(x_BFT).tolist() == [[True] * 6, [True, False, False] * 2, [True] * 6]
    assert made.decode(made.encode(x_BFT)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KMeansPatches([8, 8], 3), "patch 3 does not divide size 8; the nearest that does is 2"),
        (lambda: KMeansPatches([8, 8], 4, codes=1), "codes 1, layers 1, samples 400: at least 2, 1 and 1"),
        (lambda: KMeansPatches([8, 8], 4, codes=99).fit(pictures(4)), "16 vectors for 99 codes: more samples"),
        (
            lambda: tokenizer().decode(torch.zeros(1, 9, dtype=torch.long)),
            r"codes \[1, 9\]: this tokenizer has rows of 32",
        ),
        (lambda: tokenizer().encode(torch.zeros(1, 3, 6, 6)), "this adapter takes"),
    ],
)
def test_bad_input(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def recipe(layers: int = 2) -> Masked:
    torch.manual_seed(0)
    adapters = Adapters(image=CodeAdapter(tokenizer(layers)), text=TokenAdapter(9, 6))
    return Masked(adapters, Trunk(24, 2, 3))


def batch(rows: int = 5) -> Batch:
    g = torch.Generator().manual_seed(1)
    inputs = {"image": pictures(rows, seed=2), "text": torch.randint(1, 9, (rows, 6), generator=g)}
    present = {m: torch.ones(rows, dtype=torch.bool) for m in inputs}
    present["image"][1] = False
    inputs["image"][1] = torch.nan
    return Batch(inputs, present, index=torch.arange(rows), rng_seed=torch.arange(rows) * 7 + 1)


def test_a_masked_model_predicts_codes_and_shows_pictures() -> None:
    model, b = recipe(), batch()
    loss = model.step(model.terms(b), b).total
    loss.backward()
    frozen = [name for name, p in model.named_parameters() if p.grad is None]
    assert not frozen and loss.isfinite()  # centres are buffers
    rebuilt = model.reconstruct(b, Hide(["image"]))["image"]
    there = b.present["image"]
    assert rebuilt.prediction.shape == b.inputs["image"].shape and not rebuilt.visible.any()
    first_KP, second_KP = tokenizer().centre_LKP
    patch_NP = tokenizer().cut.raw(rebuilt.prediction[there])[0].flatten(0, 1)
    sums_SP = (first_KP[:, None] + second_KP).flatten(0, 1)
    far_NS = (patch_NP[:, None] - sums_SP).abs().amax(dim=2)
    assert float(far_NS.min(dim=1).values.max()) < ulps(2, F32)  # a code of each layer, whatever it is
    half = model.reconstruct(b)["image"]
    assert torch.equal(half.prediction[half.visible], half.truth[half.visible]) and half.visible.any()


class Few:
    """Data of forty pictures, in two batches, every third without one."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def on_before_batch_transfer(self, batch: Batch, _: int) -> Batch:
        return batch

    def sample_dataloader(self, count: int) -> list[Batch]:
        self.asked.append(count)
        present = torch.arange(20) % 3 > 0
        return [Batch({"image": pictures(20, seed)}, {"image": present}) for seed in (0, 1)]


def test_tokenizers_are_fitted_once_on_samples_that_have_the_modality() -> None:
    data = Few()
    plugin = SimpleNamespace(convert_input=lambda batch: batch)
    strategy = SimpleNamespace(batch_to_device=lambda batch, dataloader_idx: batch, root_device=torch.device("cpu"))
    trainer = SimpleNamespace(
        datamodule=data, precision_plugin=plugin, strategy=strategy, state=SimpleNamespace(stage=None)
    )
    new, old = tokenizer(fitted=False), tokenizer()
    weights = copy.deepcopy(old.state_dict())
    fit_tokenizers(trainer, {"image": new, "sketch": old})
    again = tokenizer(fitted=False)
    again.fit(torch.cat([pictures(20, seed)[torch.arange(20) % 3 > 0] for seed in (0, 1)]))
    assert torch.equal(new.centre_LKP, again.centre_LKP) and torch.equal(old.centre_LKP, weights["centre_LKP"])
    fit_tokenizers(trainer, {"image": new})
    assert data.asked == [40]
    with pytest.raises(ValueError, match="the data has no modality 'sound'"):
        fit_tokenizers(trainer, {"sound": tokenizer(fitted=False)})
    trainer.datamodule = object()
    with pytest.raises(ValueError, match="object has no sample_dataloader"):
        fit_tokenizers(trainer, {"image": tokenizer(fitted=False)})
