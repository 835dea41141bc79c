"""Adaptation to missing modalities: what is frozen stays to the bit, what is trained wins back what was lost.

Runs are written by hand: a configuration and a checkpoint. Letters: B samples, C classes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

import descant
from descant.callbacks import EMA, Resume
from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.adaptation.freeze import Freeze
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.quantize import Quantize
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import (
    Embeds,
    Features,
    ForksFeatures,
    Fuses,
    HasObjective,
    HasTowers,
    Reconstructs,
    Scores,
    Unimodal,
)
from descant.modules.io import saved
from descant.modules.missing_modalities.available_sets import AvailableSets
from descant.modules.missing_modalities.imputation import Imputation, Imputer, MeanImputer, PromptImputer, ZeroImputer
from descant.modules.missing_modalities.modulation import ModulationBank
from descant.modules.missing_modalities.modulation_forms import LowRank, Modulation, ScaleShift
from descant.modules.towers import TextTower
from descant.modules.training_setup.compile_and_shard import Compile
from descant.recipes import MissingModality, Recipe
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.ranks import run_ranks
from tests.rotation import quick
from tests.tolerance import F32, rounding

C = 4
MODALITIES = ("image", "text", "sketch")
TOWERS: dict[str, Any] = {
    "image": {"class_path": "descant.modules.towers.ConvTower", "init_args": {"widths": [16, 32]}},
    "text": {"class_path": "descant.modules.towers.BagTower", "init_args": {"vocab": 20, "width": 16}},
    "sketch": {"class_path": "descant.modules.towers.ConvTower", "init_args": {"widths": [8], "channels": 1}},
}


def node(name: str, *modalities: str, **more: Any) -> dict[str, Any]:
    towers = {"class_path": "descant.modules.towers.Towers", "init_args": {m: TOWERS[m] for m in modalities}}
    return {"class_path": f"descant.recipes.{name}", "init_args": {"towers": towers, "width": 16, **more}}


def fusion(kind: str, *modalities: str) -> dict[str, Any]:
    part = {"class_path": f"descant.modules.fusion.classifiers.{kind}"}
    return node("Fusion", *modalities, target="label", classes=C, fusion=part)


def batch(rows: int = 64, seed: int = 0, modalities: tuple[str, ...] = MODALITIES) -> Batch:
    """A noisy picture and a noiseless word of one of C classes, and a sketch that is half of the picture."""
    g, patterns = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    label_B = torch.randint(0, C, (rows,), generator=g)
    image = 0.6 * torch.randn(C, 3, 8, 8, generator=patterns)[label_B] + torch.randn(rows, 3, 8, 8, generator=g)
    text = torch.randint(3 + C, 20, (rows, 6), generator=g)
    text[:, 0] = 3 + label_B
    inputs = {"image": image, "text": text, "sketch": image[:, :1] + torch.randn(rows, 1, 8, 8, generator=g)}
    draw_B = torch.randint(0, 2**60, (rows,), generator=g)
    present = {m: torch.ones(rows, dtype=torch.bool) for m in modalities}
    return Batch({m: inputs[m] for m in modalities}, present, {"label": label_B}, rng_seed=draw_B)


def some_absent(rows: int = 12) -> Batch:
    """Samples of every set of three modalities, the whole among them."""
    b = batch(rows)
    for i, m in enumerate(MODALITIES):
        b.present[m] = (torch.arange(rows) % 7 + 1) // 2**i % 2 == 1
        b.inputs[m][~b.present[m]] = 7  # nobody looks
    b.step = dict(b.present)
    return b


def build(model: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return saved.build(Recipe, model, Path("."))


def train(model: Recipe, steps: int, *only: str, lr: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    for step in range(steps):
        b = batch(seed=1000 + step, modalities=tuple(model.towers))
        b = b.only(*only) if only else b
        optimizer.zero_grad()
        model.step(model.terms(b), b).total.backward()
        optimizer.step()


def write(folder: Path, model: dict[str, Any], recipe: nn.Module) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    torch.save({"state_dict": recipe.state_dict()}, folder / "checkpoints/last.ckpt")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained runs by name."""
    found = {}
    for name, model in {
        "fusion": fusion("MidFusion", "image", "text"),
        "three": fusion("AttentionFusion", *MODALITIES),
        "contrastive": node("Contrastive", *MODALITIES),
        "pair": node("Contrastive", "image", "text"),
    }.items():
        recipe = build(model)
        train(recipe, 200 if name == "fusion" else 5)
        found[name] = write(tmp_path_factory.mktemp("runs") / name / "001", model, recipe)
    return found


def adapted(path: Path, form: Modulation | None = None, noise: float = 0.1, **options: Any) -> MissingModality:
    """With parameters as if trained, which is what they begin as plus some noise."""
    model = MissingModality(path, bank=ModulationBank(form or ScaleShift()), **options)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.bank.parameters():  # type: ignore[union-attr]
            p.add_(noise * torch.randn(p.shape, generator=g))
    return model


def said(model: Any, b: Batch) -> dict[str, Tensor]:
    """All that a recipe says of a batch."""
    model.eval()
    with torch.no_grad():
        z = model.embed(b)
        if has(model, Fuses) and has(model, Scores):
            z = z | {f"score_{name}": term.value for name, term in model.scores(b).items()}
            z["logits"] = model.fuse(model.latents(b), b.present)
    return z


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# what it divides by ---------------------------------------------------------------------------------------------------


def test_the_own_loss_of_a_modality_is_a_mean_over_the_samples_left_with_it(tmp_path: Path) -> None:
    spec = node("Fusion", "image", "text", target="label", classes=C, unimodal=True)
    model, b = adapted(write(tmp_path / "run", spec, build(spec))), batch(modalities=("image", "text"))
    left, terms = model.drop_modalities(b).present, model.terms(b)
    objective = model.step(terms, b)
    for m, left_B in left.items():
        assert 0 < int(left_B.sum()) < len(b), "the draw leaves some samples without it"
        # float32: a sum of tens of numbers, in another order
        torch.testing.assert_close(objective.terms[m], terms[m].value[left_B].mean(), rtol=1e-5, atol=0)


# what is frozen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(["three", "contrastive"], 2))
@pytest.mark.parametrize("form", [ScaleShift(), LowRank(2)], ids=["scale", "low"])
def test_every_set_begins_as_the_run_to_the_bit(runs: dict[str, Path], name: str, form: Modulation) -> None:
    model, frozen = adapted(runs[name], form, noise=0.0), descant.load(runs[name])
    b = batch(12)
    for left in (b, *(b.only(*s) for s in model.bank.sets.sets), some_absent()):  # type: ignore[union-attr]
        assert same(said(model, left), said(frozen, left))


@pytest.mark.parametrize("form", [ScaleShift(), LowRank(2)], ids=["scale", "low"])
def test_training_leaves_the_run_and_what_it_says_of_whole_samples(runs: dict[str, Path], form: Modulation) -> None:
    model, frozen = adapted(runs["fusion"], form, noise=0.0), descant.load(runs["fusion"])
    before = said(model, batch().only("image"))
    train(model, 10)
    b = batch()
    assert same(said(model, b), said(frozen, b))
    assert not torch.allclose(said(model, b.only("image"))["logits"], before["logits"], atol=1e-3)
    model.train()
    model.terms(b)
    assert equal(state(model.inner), state(frozen))  # running statistics and their counters too
    assert model.bank is not None and model.bank.training and not any(m.training for m in model.inner.modules())


def test_only_the_sets_that_occur_have_a_gradient(runs: dict[str, Path]) -> None:
    model = adapted(runs["three"], available=AvailableSets([["image"], ["image", "text"]]))
    b = batch()
    model.step(model.terms(b), b).total.backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"bank"}
    model = adapted(runs["three"])
    keep = model.available.remaining_modalities(b.present, b.rng_seed, model.modalities)
    rows = ~(keep["text"] & keep["sketch"])  # all sets but one
    b = b.select(rows)
    model.step(model.terms(b), b).total.backward()
    assert model.bank is not None
    touched = {
        name: any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())
        for name, part in model.bank.parts.items()
    }
    assert touched == {name: name != "text+sketch" for name in model.bank.sets.names}
    assert all(p.grad is not None for p in model.bank.parameters())  # zeros, so that ranks agree


def test_the_trained_share_is_below_one_per_cent_of_a_million(tmp_path: Path) -> None:
    vit = {"size": 16, "patch": 4, "width": 256, "depth": 2, "heads": 4}
    text = {"vocab": 4096, "width": 128, "depth": 2, "heads": 4, "length": 8}
    model = fusion("MidFusion", "image", "text")
    model["init_args"]["towers"]["init_args"] = {
        "image": {"class_path": "descant.modules.towers.PatchTower", "init_args": vit},
        "text": {"class_path": "descant.modules.towers.TextTower", "init_args": text},
    }
    recipe = MissingModality(write(tmp_path / "big", model, build(model)), bank=ModulationBank())
    trained = [p for p in recipe.parameters() if p.requires_grad]
    total = sum(p.numel() for p in recipe.inner.parameters())
    assert total > 1_000_000 and recipe.bank is not None
    share = sum(p.numel() for p in trained) / total
    assert share == recipe.bank.share(recipe.inner) and 0.001 < share <= 0.01
    # by hand: 22 widths a block, 2 for the last norm of a tower and the head's, the patches, the heads and the fusion
    blocks = 2 * 22 * 256 + 2 * 256 + 2 * 256, 2 * 22 * 128 + 2 * 128
    both = 2 * (2 * 256 + 2 * 16 + 2 * 128 + 2 * 16 + 2 * 256 + 2 * C)
    assert sum(recipe.bank.count().values()) == sum(blocks) + both


# rows of several sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["three", "contrastive"])
@pytest.mark.parametrize("form", [ScaleShift(), LowRank(2)], ids=["scale", "low"])
def test_samples_of_several_sets_are_what_each_is_alone(runs: dict[str, Path], name: str, form: Modulation) -> None:
    model, frozen, b = adapted(runs[name], form), descant.load(runs[name]), some_absent()
    found = said(model, b)
    for i in range(len(b)):
        alone = said(model, b.select(slice(i, i + 1)))
        for key, value in alone.items():
            torch.testing.assert_close(found[key][i], value[0], **rounding(64, F32))
    without = said(frozen, b)
    moved = {m: (found[m] - without[m]).abs().amax(dim=1) for m in MODALITIES}
    for m in MODALITIES:  # and it is no identity, but for samples that have everything
        some = torch.stack(list(b.present.values())).sum(dim=0) < 3
        assert (moved[m][b.present[m] & some] > 1e-3).all() and not moved[m][~some | ~b.present[m]].gt(1e-6).any()


def masked() -> dict[str, Any]:
    adapters = {
        "image": {
            "class_path": "descant.modules.masking.adapters.PatchAdapter",
            "init_args": {"size": [8, 8], "patch": 4},
        },
        "sketch": {
            "class_path": "descant.modules.masking.adapters.PatchAdapter",
            "init_args": {"size": [8, 8], "patch": 4, "channels": 1},
        },
    }
    arguments = {
        "adapters": {"class_path": "descant.modules.masking.adapters.Adapters", "init_args": adapters},
        "encoder": {
            "class_path": "descant.modules.towers.vit.Trunk",
            "init_args": {"width": 24, "depth": 2, "heads": 3},
        },
        "decoder": {
            "class_path": "descant.modules.masking.decoders.JointDecoder",
            "init_args": {"width": 24, "heads": 3},
        },
    }
    return {"class_path": "descant.recipes.Masked", "init_args": arguments}


def test_a_masked_model_is_adapted_token_by_token(tmp_path: Path) -> None:
    path = write(tmp_path / "run", masked(), build(masked()))
    b = batch(12, modalities=("image", "sketch"))
    b.present["image"], b.present["sketch"] = torch.arange(12) % 3 != 0, torch.arange(12) % 3 != 1
    b.step = dict(b.present)
    model = adapted(path, noise=0.0)
    assert isinstance(model, Reconstructs) and model.modalities == ("image", "sketch")
    assert same(said(model, b.only("image")), said(descant.load(path), b.only("image")))
    bank = ModulationBank()  # adapters, encoder and decoder alike
    model = MissingModality(path, bank=bank)
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    found = said(model, b)
    for i in range(len(b)):
        alone = said(model, b.select(slice(i, i + 1)))
        for m in model.modalities:
            torch.testing.assert_close(found[m][i], alone[m][0], **rounding(128, F32))
    assert not torch.allclose(found["image"], said(descant.load(path), b)["image"], atol=1e-3)
    model.step(model.terms(b), b).total.backward()
    assert all(bool(p.grad.any()) for p in bank.of("sketch", "towers.encoder.norm").parameters() if p.grad is not None)


def test_a_loss_of_several_sets_is_that_of_each_alone(runs: dict[str, Path]) -> None:
    model = adapted(runs["fusion"])
    b = batch()
    left = model.drop_modalities(b)
    loss = model.step(model.terms(b), b).total
    total = torch.zeros(())
    for i in range(len(b)):
        one = left.select(slice(i, i + 1))
        with model.routing(one) as there:
            total = total + model.inner.terms(there)["fused"].value[0]
    torch.testing.assert_close(loss, total / len(b), **rounding(64, F32))


# what it wins back --------------------------------------------------------------------------------------------------


def accuracy(model: Any, *only: str) -> float:
    b = batch(1000, seed=5, modalities=("image", "text"))
    model.eval()
    with torch.no_grad():
        return float(model.scores(b.only(*only) if only else b)["accuracy"].value.mean())


@pytest.mark.slow
def test_it_wins_back_what_the_missing_text_costs_and_its_sham_does_not(runs: dict[str, Path]) -> None:
    frozen, dedicated = descant.load(runs["fusion"]), build(fusion("MidFusion", "image", "text"))
    train(dedicated, 200, "image")
    low, high, whole = accuracy(frozen, "image"), accuracy(dedicated, "image"), accuracy(frozen)
    assert high - low > 0.1, (low, high)

    def recovered(sham: Any = None, form: Modulation | None = None) -> float:
        torch.manual_seed(0)
        model = MissingModality(runs["fusion"], bank=ModulationBank(form, sham=sham))
        train(model, 150)
        assert accuracy(model) == whole
        return (accuracy(model, "image") - low) / (high - low)

    assert recovered() > 0.8
    assert recovered(form=LowRank(1)) > 0.8
    assert recovered("permute") < 0.4


# what stands in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [ZeroImputer(), MeanImputer(), PromptImputer()], ids=["zero", "mean", "prompt"])
def test_a_fill_is_what_the_fusion_sees_of_an_absent_modality(runs: dict[str, Path], fill: Imputer) -> None:
    model = MissingModality(runs["three"], fill=copy.deepcopy(fill))
    frozen: Any = descant.load(runs["three"])
    train(model, 3) if isinstance(fill, PromptImputer) else model.train().terms(batch())
    model.eval()
    b = some_absent()
    assert model.fill is not None
    whole, z = {m: torch.ones(len(b), dtype=torch.bool) for m in MODALITIES}, {}
    for m in MODALITIES:
        nothing_BD = torch.zeros(len(b), frozen.towers.width(m))
        h_BD = Imputation(model.fill, b.present).impute(nothing_BD, m, whole[m])
        h_BD = torch.where(b.present[m][:, None], frozen.present_features(b, m), h_BD)
        assert bool(h_BD[~b.present[m]].any()) != isinstance(fill, ZeroImputer)
        z[m] = frozen.heads[m](h_BD)
    with torch.no_grad():
        wanted, found = frozen.fuse(z, whole), model.fuse(model.latents(b), whole)
        torch.testing.assert_close(found, wanted, **rounding(64, F32))
        assert not torch.allclose(found, frozen.fuse(frozen.latents(b), b.present), atol=1e-3)
        assert not model.embed(b)["text"][~b.present["text"]].any()
        everything = batch(12)
        assert same(said(model, everything), said(frozen, everything))


def test_a_mean_is_that_of_the_features_that_training_saw(runs: dict[str, Path]) -> None:
    model, frozen = MissingModality(runs["fusion"], fill=MeanImputer()), descant.load(runs["fusion"])
    rows = []
    for seed in range(3):
        b = batch(seed=seed)
        model.train().terms(b)
        keep = model.drop_modalities(b)
        rows.append(frozen.present_features(keep, "image")[keep.present["image"]])  # type: ignore[operator]
    sum_D1 = model.state_dict()["fill.sum_image"]
    torch.testing.assert_close(
        (sum_D1[:-1] / sum_D1[-1]).float(), torch.cat(rows).mean(dim=0).detach(), **rounding(4, F32)
    )


# baselines ----------------------------------------------------------------------------------------------------------


def test_lora_is_a_baseline_that_leaves_the_rest(tmp_path: Path) -> None:
    model = fusion("LateFusion", "image", "text")
    words = {"vocab": 20, "width": 16, "depth": 1, "heads": 2, "length": 6, "dropout": 0.5}
    tower = {"class_path": "descant.modules.towers.TextTower", "init_args": words}
    model["init_args"]["towers"]["init_args"] = {"image": TOWERS["image"], "text": tower}
    path = write(tmp_path / "run", model, build(model))
    recipe = MissingModality(path, adapt=[Lora(r=2, dropout=0.5, towers=["text"])])
    frozen = descant.load(path)
    recipe.configure_model()
    assert {n.split("lora_")[1][:1] for n, p in recipe.named_parameters() if p.requires_grad} == {"A", "B"}
    b = batch(modalities=("image", "text"))
    assert same(said(recipe, b), said(frozen, b))
    recipe.train()
    modes = {m.training for n, m in recipe.inner.named_modules() if n.endswith("lora_dropout.default")}
    assert modes == {True} and not recipe.inner.towers["text"].layers[0].training  # type: ignore[union-attr,index]
    train(recipe, 5)
    assert not torch.allclose(said(recipe, b.only("text"))["logits"], said(frozen, b.only("text"))["logits"], atol=1e-4)


def test_towers_that_the_run_had_frozen_are_adapted_too(tmp_path: Path) -> None:
    freeze = {
        "class_path": "descant.modules.adaptation.freeze.Freeze",
        "init_args": {"towers": ["image"], "capacity": 99},
    }
    model = fusion("MidFusion", "image", "text")
    model["init_args"]["adapt"] = [freeze]
    recipe = build(model)
    recipe.configure_model()
    path = write(tmp_path / "run", model, recipe)
    adapts, b = adapted(path, noise=0.0), batch(modalities=("image", "text"))
    assert same(said(adapts, b), said(descant.load(path), b))
    adapts.step(adapts.terms(b), b).total.backward()
    assert adapts.bank is not None
    grads = [p.grad for p in adapts.bank.of("image", "towers.image.stem.0").parameters()]
    assert all(grad is not None and bool(grad.any()) for grad in grads)


def test_all_of_it_may_train_on(runs: dict[str, Path]) -> None:
    model = MissingModality(runs["fusion"], frozen=False)
    before = state(model.inner)
    train(model, 2)
    after = state(model.inner)
    assert all(not torch.equal(before[k], after[k]) for k in before if not k.endswith("_k.bias"))


# what it claims, and what it refuses --------------------------------------------------------------------------------


def test_protocols_are_those_of_the_inner_recipe(runs: dict[str, Path]) -> None:
    fuses, contrasts = adapted(runs["fusion"]), adapted(runs["contrastive"])
    for protocol in (HasObjective, HasTowers, Embeds, Features, ForksFeatures):
        assert has(fuses, protocol) and has(contrasts, protocol)
    for claimed in (Fuses, Unimodal, Scores):
        assert has(fuses, claimed) and not has(contrasts, claimed)
    assert contrasts.in_batch_negatives and not fuses.in_batch_negatives
    assert fuses.inner.step is fuses.step and not has(contrasts, Reconstructs)
    twin, b = copy.deepcopy(fuses), batch().only("image")
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert not torch.allclose(said(twin, b)["logits"], said(fuses, b)["logits"])


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fusion", {"bank": ModulationBank(), "chunks": 2}, "chunks: layers run outside the routing of a bank"),
        ("fusion", {"bank": ModulationBank(), "compile": Compile()}, "compile: layers run outside"),
        ("fusion", {"bank": ModulationBank(sets=[["image"]])}, "bank: samples are left with text, which is not in its"),
        (
            "fusion",
            {"bank": ModulationBank(), "available": AvailableSets([["imge"]])},
            "sets: 'imge': no such name; did you mean image",
        ),
        (
            "fusion",
            {"bank": ModulationBank(sets=[["image"], ["text"]]), "available": AvailableSets([["text"]])},
            "nothing would be learned for image, which no sample is left with",
        ),
        ("fusion", {"bank": ModulationBank(), "available": AvailableSets([["text", "image"]])}, "none but everything"),
        ("nowhere", {}, "nowhere: no such run, checkpoint or export"),
        ("fusion", {"checkpoint": "none.ckpt"}, "none.ckpt: no such checkpoint of .*last.ckpt"),
    ],
)
def test_bad_requests_are_one_line(runs: dict[str, Path], name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        MissingModality(runs.get(name, Path("nowhere")), **options)
    assert "\n" not in str(caught.value)


def test_layers_that_others_replace_after_the_bank_was_made_are_told(runs: dict[str, Path], tmp_path: Path) -> None:
    net = adapted(runs["fusion"], adapt=[Freeze(["image"])], optimizer=adam)
    with pytest.raises(ValueError, match=r"bank: layer towers\.image\.\S+ was replaced after it was given parameters"):
        fit(tmp_path, data=PatternData(), net=net)

    def words() -> Any:
        recipe: Any = nn.Module()
        recipe.towers = nn.ModuleDict({"text": TextTower(vocab=9, width=8, depth=1, heads=2, length=4)})
        return recipe

    held = words()
    bank = ModulationBank(layers=["mlp.2"]).attach(held, ["image", "text"])
    Quantize(skip=["mlp.2"]).apply(held)
    Lora(r=2).apply(held)  # adapters call what they adapt
    bank.require_hooked(held)
    held = words()
    bank = ModulationBank(layers=["mlp.2"]).attach(held, ["image", "text"])
    Quantize().apply(held)
    with pytest.raises(ValueError, match=r"bank: layer towers\.text\.layers\.0\.mlp\.2 was replaced"):
        bank.require_hooked(held)


def test_a_set_that_no_term_learns_from_is_refused(runs: dict[str, Path]) -> None:
    b = batch(modalities=("image", "text"))
    says = "no term of Contrastive has a valid row where only image is there, so nothing is learned for it"
    with pytest.raises(ValueError, match=says):
        adapted(runs["pair"]).terms(b)
    adapted(runs["contrastive"], available=AvailableSets([["image", "text"]])).terms(batch())
    unlabelled = batch()
    unlabelled.targets["label"].fill_(-1)
    with pytest.raises(ValueError, match="no term of Fusion has a valid row"):
        adapted(runs["fusion"]).terms(unlabelled)


# whole runs ---------------------------------------------------------------------------------------------------------


class Patterns(BatchDataset):
    def __len__(self) -> int:
        return 44

    def present(self, index_N: Any) -> dict[str, Tensor]:
        return {m: torch.ones(len(index_N), dtype=torch.bool) for m in self.names}

    def rows(self, index_B: Any, draw_B: Any) -> Rows:
        b = batch(44, modalities=self.names).select(torch.as_tensor(index_B))
        return Rows(b.inputs, b.targets, b.content_id)

    names: tuple[str, ...] = ("image", "text")


class PatternData(DataModule):
    def __init__(self, *names: str) -> None:
        self.names = names or ("image", "text")
        super().__init__(8)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.names

    def training_set(self) -> Patterns:
        data = Patterns(0)
        data.names = self.names
        return data

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": self.training_set()}


def adam(groups: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=1e-2)


@pytest.mark.parametrize("fill", quick([None, PromptImputer(), MeanImputer()], 3, ids=["bank", "prompt", "mean"]))
def test_a_resumed_run_ends_in_the_same_bits(runs: dict[str, Path], tmp_path: Path, fill: Any) -> None:
    def net() -> Any:
        return adapted(runs["fusion"], noise=0.0, optimizer=adam, fill=copy.deepcopy(fill))

    whole = Act()
    options: dict[str, Any] = {"max_epochs": 2}
    every = Resume(every=1, keep=99)
    trainer, model = fit(tmp_path / "a", every, EMA(0.8), whole, data=PatternData(), net=net(), **options)
    assert 0 < trainer.callback_metrics["trainable/share"] < 0.5
    assert len(set(whole.losses)) == len(whole.losses)
    for step in (1, 7):
        rest, path, data = Act(), point(tmp_path / "a", step), PatternData()
        _, again = fit(tmp_path / "b", Resume(every=1), EMA(0.8), rest, path=path, data=data, net=net(), **options)
        assert equal(state(model), state(again)) and rest.losses == whole.losses[step:], step
    assert equal(state(cast(Any, model).inner), state(descant.load(runs["fusion"])))


def test_a_run_is_loaded_with_its_bank(runs: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(runs["fusion"])
    kind = "descant.modules.missing_modalities.modulation."
    bank = {"class_path": f"{kind}ModulationBank", "init_args": {"sets": [["text"], ["image"]]}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}
    arguments: dict[str, Any] = {"path": str(runs["fusion"]), "bank": bank, "optimizer": optimizer}
    written: dict[str, Any] = {"class_path": "descant.recipes.MissingModality", "init_args": arguments}
    path, b = write(tmp_path / "001", written, model), batch().only("image")
    again = descant.load(path)
    assert isinstance(again, MissingModality) and same(said(again, b), said(model, b))
    assert not torch.allclose(said(again, b)["logits"], said(descant.load(runs["fusion"]), b)["logits"])
    with pytest.raises(ValueError, match=r"it is adapted already; give the run that it adapts, .*fusion/001"):
        MissingModality(path, bank=ModulationBank())
    arguments["available"] = {
        "class_path": "descant.modules.missing_modalities.available_sets.AvailableSets",
        "init_args": {"sets": [["text"]]},
    }
    arguments["bank"] = {"class_path": f"{kind}ModulationBank"}
    with pytest.raises(ValueError, match=r"bank\.parts\.image\.\S+ \[16\] is in the file, and the model has no such"):
        descant.load(write(tmp_path / "002", written, model))


def test_at_setup_the_data_have_a_tower_and_the_step_is_whole(runs: dict[str, Path], tmp_path: Path) -> None:
    net = adapted(runs["fusion"], optimizer=adam)
    with pytest.raises(ValueError, match="no tower for 'sketch' of the data, only image, text"):
        fit(tmp_path, data=PatternData(*MODALITIES), net=net)
    with pytest.raises(ValueError, match="accumulate_grad_batches 2: what is left of the other micro-batches"):
        fit(tmp_path, data=PatternData(), net=net, accumulate_grad_batches=2)


def on_a_rank(rank: int, world: int, path: Path, name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    grads = gradients(path, name, options, world, slice(rank * 8, rank * 8 + 8))
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= world
    dist.destroy_process_group()
    return grads


def gradients(path: Path, name: str, options: dict[str, Any], world: int, rows: slice) -> dict[str, Tensor]:
    model = adapted(path, fill=PromptImputer() if name == "three" else None, **options)
    model.step.world = world
    b = batch(16)
    if name == "contrastive":
        order = (
            model.available.remaining_modalities(b.present, b.rng_seed, model.modalities)["sketch"]
            .int()
            .argsort(stable=True)
        )
        b = b.select(order)  # the first rank has no sketch at all
    b = b.select(rows)
    model.step(model.terms(b), b).total.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.grad for n, p in trained.items() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", ["three", "contrastive"])
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_two_ranks_equal_one(runs: dict[str, Path], name: str, per: Any) -> None:
    sets = [["image", "text"], ["image", "sketch"]] if name == "contrastive" else None
    options: dict[str, Any] = {"available": AvailableSets(sets, per=per)}
    wanted = gradients(runs[name], name, options, 1, slice(None))
    model = adapted(runs[name], fill=PromptImputer() if name == "three" else None, **options)
    assert set(wanted) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(bool(grad.any()) for grad in wanted.values()) > 10
    for found in run_ranks(2, on_a_rank, 2, runs[name], name, options):
        assert found.keys() == wanted.keys()
        for key, grad in wanted.items():
            # two ranks add in another order: gradients of 1e-2 to 1, whose sums cancel down to a hundredth
            torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-6)
