"""Objectives over shared streams: terms as of separate forwards, each stream once, and what is absent or unused.

Letters: B samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from descant.callbacks import EMA, HarmonizeFeatures, Resume
from descant.modules.core.batch import Batch
from descant.modules.core.protocols import Embeds, Features, ForksFeatures, HasObjective, HasTowers, Matches, Scores
from descant.modules.fusion.cross_encoder import FusionLayers
from descant.modules.io.names import full
from descant.modules.losses import InfoNCE
from descant.modules.masking.adapters import MSE, PatchAdapter
from descant.modules.masking.corruptions import UniformMask
from descant.modules.masking.discrete_adapters import TokenAdapter
from descant.modules.masking.structured import SpanMask
from descant.modules.missing_modalities.imputation import Imputation, ZeroImputer
from descant.modules.missing_modalities.modulation import ModulationBank
from descant.modules.multitask import GradVac
from descant.modules.objectives.base import TaskObjective
from descant.modules.objectives.classify import Classify
from descant.modules.objectives.contrast import Contrast
from descant.modules.objectives.masked import MaskedTokens
from descant.modules.objectives.match import Match
from descant.modules.objectives.streams import Streams
from descant.modules.towers import ConvTower, PatchTower, TextTower, Towers
from descant.recipes import MissingModality, MultiTask
from tests.ranks import run_ranks
from tests.recipes.test_missing import MODALITIES, C, batch, build, node, write
from tests.step_toy import QUIET, KeepGradients, largest_gap
from tests.tolerance import F32, F64, rounding, ulps


def words(corruption: Any = None, given: str | None = "image") -> MaskedTokens:
    return MaskedTokens("text", TokenAdapter(20, 6), given, corruption or UniformMask(0.5))


def objectives() -> dict[str, TaskObjective]:
    patches = PatchAdapter([8, 8], 4, losses=[MSE(norm=True)])
    return {
        "contrast": Contrast([["image", "text"]]),
        "match": Match(["image", "text"]),
        "words": words(),
        "patches": MaskedTokens("image", patches, corruption=UniformMask(0.5)),
        "kind": Classify("label", C, ["image"]),
        "both": Classify("label", C, ["text", "image"]),
    }


def multitask(*names: str, fusion: bool = True, more: dict[str, TaskObjective] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    towers = Towers(
        image=PatchTower(8, 4, 16, 1, 2), text=TextTower(20, 16, 1, 2, 6), sketch=ConvTower([8], channels=1)
    )
    layers = FusionLayers(16, 1, 2) if fusion else None
    every = objectives()
    return MultiTask(towers, {name: every[name] for name in names or every} | (more or {}), 8, layers, **options)


def samples(rows: int = 8) -> Batch:
    """Samples of every content but two, in float64."""
    b = batch(rows)
    b.content_id = torch.arange(rows)
    b.content_id[1] = b.content_id[3]
    b.inputs = {m: x.double() if x.is_floating_point() else x for m, x in b.inputs.items()}
    return b


def without(b: Batch, **absent: list[int]) -> Batch:
    for m, rows in absent.items():
        b.present[m][rows] = False
        if b.inputs[m].is_floating_point():
            b.inputs[m][rows] = torch.nan
    b.step = {m: mask_B.clone() for m, mask_B in b.present.items()}
    return b


def gradients(model: MultiTask, b: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model.step(model.terms(b), b).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Calls:
    """Rows that a module has seen, call by call."""

    def __init__(self, module: nn.Module, name: str = "forward") -> None:
        self.rows: list[int] = []
        run = getattr(module, name)

        def counted(x: Any, *args: Any) -> Any:
            self.rows.append(len(x))
            return run(x, *args)

        setattr(module, name, counted)


# terms ----------------------------------------------------------------------------------------------------------------


def test_terms_are_those_of_separate_forwards() -> None:
    model, b = multitask().double(), samples()
    terms = {name: term.value for name, term in model.terms(b).items()}
    towers, everyone = model.towers, torch.ones(8, dtype=torch.bool)
    z = {m: F.normalize(model.heads[m](towers[m](b.inputs[m]).h_BTD.mean(1)), dim=1) for m in ("image",)}
    text = towers["text"](b.inputs["text"])
    assert text.mask_BT.all()
    z["text"] = F.normalize(model.heads["text"](text.h_BTD.mean(1)), dim=1)
    kind, both, match = (model.objectives[name] for name in ("kind", "both", "match"))
    wanted = {
        "contrast": InfoNCE().double()(z["image"], z["text"], b.content_id, everyone),
        "kind": F.cross_entropy(kind.head.projection(z["image"]), b.targets["label"], reduction="none"),
    }
    firsts, scores, negatives = [], {}, match.negative_rows(Streams(model, b), b, across=False)

    def first(i: int, j: int) -> Tensor:
        h_1 = model.fusion.maps["image"](towers["image"](b.inputs["image"][i : i + 1]).h_BTD)
        h_2 = model.fusion.maps["text"](towers["text"](b.inputs["text"][j : j + 1]).h_BTD)
        h = torch.cat([model.fusion.first_D.expand(1, 1, -1), h_1, h_2], dim=1)
        for layer in model.fusion.layers:
            h = layer(h)
        return model.fusion.norm(h)[:, 0]

    for i in range(8):
        own, j, k = first(i, i), int(negatives[0][i]), int(negatives[1][i])
        assert b.content_id[i] not in (b.content_id[j], b.content_id[k])
        firsts.append(own)
        s = [match.score(h)[0, 0] for h in (own, first(i, j), first(k, i))]
        scores[i] = -(F.logsigmoid(s[0]) + F.logsigmoid(-s[1]) + F.logsigmoid(-s[2])) / 3
    wanted["both"] = F.cross_entropy(both.head.projection(torch.cat(firsts)), b.targets["label"], reduction="none")
    wanted["match"] = torch.stack(list(scores.values()))
    for name, value_B in wanted.items():
        torch.testing.assert_close(terms[name], value_B, **rounding(512, F64))


def test_each_stream_is_made_once_asks() -> None:
    model, b = multitask(), batch(8)
    image, text = Calls(model.towers["image"]), Calls(model.towers["text"])
    hidden = {m: Calls(model.towers[m], "embed") for m in ("image", "text")}
    pairs = Calls(model.fusion.layers[0])
    model.train()(b)
    # a tower's forward embeds too: once as it is, once with hidden tokens
    assert image.rows == text.rows == [8] and {m: calls.rows for m, calls in hidden.items()} == {
        "image": [8, 8],
        "text": [8, 8],
    }
    # own pairs for match and both, two negatives of each, own pairs with hidden words
    assert sorted(pairs.rows) == [8, 8, 16]


def test_the_tower_of_no_objective_is_not_run_and_is_frozen() -> None:
    model, b = multitask("contrast", "words"), batch(8)
    sketch = Calls(model.towers["sketch"])
    assert model.required_modalities == ("image", "text") and model.forks["sketch"] == ()
    grads = gradients(model, b)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained and not any("sketch" in name for name in trained) and sketch.rows == []
    only_words = multitask("words")
    assert not any(p.requires_grad for m in MODALITIES for p in only_words.heads[m].parameters())
    assert gradients(only_words, b).keys() == {n for n, p in only_words.named_parameters() if p.requires_grad}


# what is absent -------------------------------------------------------------------------------------------------------


def test_what_is_absent_changes_nothing_and_costs_nothing() -> None:
    """Samples that lack both modalities are no rows, and those that lack one have the terms of the other alone."""
    model = multitask().double()
    b = without(samples(), image=[2, 5], text=[2, 5])
    wanted = samples().select(torch.tensor([0, 1, 3, 4, 6, 7]))
    wanted.step = dict(wanted.present)
    image, text = Calls(model.towers["image"]), Calls(model.towers["text"])
    found, small = gradients(model, b), gradients(model, wanted)
    assert image.rows == text.rows == [6, 6]
    for name, grad in small.items():
        # gradients of up to 10, summed over samples and tokens
        torch.testing.assert_close(found[name], grad, rtol=0, atol=10 * ulps(256, F64))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_batch_without_a_modality_is_finite_and_reaches_every_parameter(modality: str) -> None:
    model, b = multitask(), batch(4)
    b.inputs["image"] = b.inputs["image"].clone()
    without(b, **{modality: [0, 1, 2, 3]})
    found = gradients(model, b)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad.isfinite().all() for grad in found.values())
    of_pairs = {name: term for name, term in model.terms(b).items() if name in ("contrast", "match", "words", "both")}
    assert all(float(term.sum().detach()) == 0 for term in of_pairs.values())
    assert not any(grad.any() for name, grad in found.items() if name.startswith(("fusion", f"towers.{modality}")))


def test_imputed_features_are_what_is_embedded() -> None:
    model, b = multitask("contrast"), batch(6, modalities=("image", "text"))
    here = torch.tensor([True, True, False, True, False, True])
    model.imputation = Imputation(ZeroImputer(), {"image": here, "text": torch.ones_like(here)})
    image = Calls(model.towers["image"])
    z = model(b).latents["image"]
    assert image.rows == [4] and torch.equal(z, model.embed(b)["image"])


# with everything around it --------------------------------------------------------------------------------------------


class Data(L.LightningDataModule):
    """Two batches an epoch."""

    def __init__(self, rank: int = 0, world: int = 1, rows: int = 8) -> None:
        super().__init__()
        whole = [without(batch(rows, seed=n), image=[1], text=[3, 6]) for n in range(2)]
        for b in whole:
            b.content_id = torch.arange(rows)
        self.batches = [b.select(slice(rank, None, world)) for b in whole]

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


class KeepTrained(KeepGradients):
    """Of what trains; what nothing reads is frozen."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        trained = {name: p.grad for name, p in pl_module.named_parameters() if p.requires_grad}
        self.gradients = {name: grad.clone() for name, grad in trained.items() if grad is not None}
        assert self.gradients.keys() == trained.keys()


def fitted(rank: int = 0, world: int = 1, chunks: int = 1, steps: int = 1) -> dict[str, Tensor]:
    model, keep = multitask(chunks=chunks, optimizer=torch.optim.SGD).double(), KeepTrained()
    data = Data(rank, world)
    for b in data.batches:
        b.inputs["image"] = b.inputs["image"].double()
    strategy = "ddp" if world > 1 else "auto"
    L.Trainer(max_steps=steps, devices=world, strategy=strategy, callbacks=[keep], **QUIET).fit(model, data)
    return keep.gradients


def test_chunks_have_the_gradients_of_the_whole_batch() -> None:
    assert largest_gap(fitted(chunks=4), fitted()) < ulps(64, F64)


def two_ranks(rank: int) -> list[dict[str, Tensor]]:
    return [fitted(rank, 2), fitted(rank, 2, chunks=2)]


@pytest.mark.ddp
def test_two_ranks_learn_what_one_learns() -> None:
    """By samples of another rank too; DDP waits for every parameter, and for none that nothing reads."""
    wanted = fitted()
    for found in run_ranks(2, two_ranks):
        assert [gap for gap in (largest_gap(each, wanted) for each in found) if gap >= ulps(256, F64)] == []


def test_resumed_it_is_bit_identical(tmp_path: Path) -> None:
    def run(folder: str, path: Path | None = None) -> dict[str, Tensor]:
        model = multitask(optimizer=torch.optim.AdamW)
        trainer = L.Trainer(
            max_steps=4, callbacks=[Resume(every=1, keep=9), EMA(0.8)], default_root_dir=tmp_path / folder, **QUIET
        )
        trainer.fit(model, Data(), ckpt_path=path, weights_only=False)
        return {name: x.clone() for name, x in model.state_dict().items()}

    whole = run("a")
    again = run("b", tmp_path / "a/resume/step-0000002.ckpt")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_terms_meet_at_the_embeddings() -> None:
    model, met, b = multitask(), [], samples()
    b.inputs["image"] = b.inputs["image"].float()
    plain = gradients(model, b)

    def rule(g_KBD: Tensor, names: tuple[str, ...]) -> Tensor:
        met.append((names, tuple(g_KBD.shape)))
        return g_KBD.sum(0)

    model.hooks.rule = rule
    ruled = gradients(model, b)
    assert met == [(("contrast", "kind"), (2, 8, 8))]
    for name, grad in plain.items():
        torch.testing.assert_close(ruled[name], grad, rtol=0, atol=10 * ulps(16, F32))  # of up to 10
    trainer = L.Trainer(max_steps=2, callbacks=[HarmonizeFeatures(GradVac())], **QUIET)
    trainer.fit(multitask(), Data())
    assert trainer.global_step == 2


def test_a_trained_one_is_adapted_to_missing_modalities(tmp_path: Path) -> None:
    """A bank modulates the layers of towers, fusion and objectives by what each sample is left with."""
    model, pair = node("MultiTask", *MODALITIES), ["image", "text"]
    match = {"class_path": full("Match"), "init_args": {"pair": pair}}
    both = {"class_path": full("Classify"), "init_args": {"target": "label", "classes": C, "modalities": pair}}
    layers = {"class_path": full("FusionLayers"), "init_args": {"width": 16, "depth": 1, "heads": 2}}
    model["init_args"] |= {"fusion": layers, "objectives": {"match": match, "both": both}}
    adapted: Any = MissingModality(write(tmp_path / "run", model, build(model)), bank=ModulationBank())
    b = batch(32)
    b.content_id = torch.arange(32)
    terms = adapted.train().terms(b)
    adapted.step(terms, b).total.backward()
    assert terms.keys() == {"match", "both"} and 1 < int(terms["match"].count()) < 32
    grads = {name: p.grad for name, p in adapted.bank.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(any(part in name for name in grads) for part in ("towers", "fusion", "objectives"))
    assert all(p.grad is None for p in adapted.inner.parameters() if not p.requires_grad)
    with torch.no_grad():
        assert adapted.eval().scores(b)["accuracy_match"].valid.all()


def test_what_parameters_are_shared() -> None:
    model = multitask()
    shared = set(model.shared_parameters())
    assert set(model.fusion.parameters()) <= shared and shared.isdisjoint(model.objectives.parameters())


def test_protocols_and_scores() -> None:
    model, b = multitask().eval(), batch(8)
    for protocol in (HasObjective, HasTowers, Embeds, Features, ForksFeatures, Matches, Scores):
        assert isinstance(model, protocol), protocol
    with torch.no_grad():
        found = model.validation_step(b, 0)
        assert {*found["scores"]} == {"accuracy_match", "loss_words", "loss_patches", "accuracy_kind", "accuracy_both"}
        assert all(torch.equal(found["z"][m], z) for m, z in model.embed(b).items())
        at = torch.tensor([0, 1])
        scorers = {name: scorer(at, at) for name, scorer in model.scorers(b).items()}
    assert scorers.keys() == model.pairs.keys() == {"contrast", "match"}
    wanted = (found["z"]["image"] * found["z"]["text"]).sum(1)[:2] / 0.07
    torch.testing.assert_close(scorers["contrast"], wanted, rtol=ulps(64, F32), atol=ulps(64, F32) / 0.07)


# what cannot be -------------------------------------------------------------------------------------------------------


def test_two_that_hide_differently_have_a_stream_each_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, b = multitask("words", more={"spans": words(SpanMask(0.5)), "again": words()}), batch(8)
    text = Calls(model.towers["text"], "embed")
    model(b)
    assert text.rows == [8, 8]
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        L.Trainer(max_steps=2, **QUIET).fit(model, Data())
    line = "objectives: words and spans hide text differently: a forward of its tower for each"
    assert [m for m in (record.getMessage() for record in caplog.records) if "hide" in m] == [line]


def test_what_cannot_be_is_refused_in_one_line() -> None:
    patches = PatchAdapter([8, 8], 4)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: multitask("match", fusion=False), r"objectives: match: needs image and text fused, and no layers do"),
        (lambda: multitask(more={"c": Contrast([["imgae", "text"]])}), r"objectives: c: 'imgae': .*mean image\?"),
        (lambda: multitask(more={"c": Classify("label", C, ["txt"])}), r"objectives: c: 'txt': .*mean text\?"),
        (lambda: multitask(more={"m": Match(["text", "sound"])}), r"objectives: m: 'sound': no such name"),
        (lambda: multitask(more={"m": MaskedTokens("sketch", patches)}), "tower sketch: ConvTower cannot hide tokens"),
        (lambda: multitask(more={"m": words(given="text")}), "text with text: two modalities are fused"),
        (lambda: Match(["text", "text"]), "not two modalities"),
        (lambda: Match(["image", "text"], temperature=0.0), "temperature 0: must be above 0"),
        (lambda: Contrast([]), "pairs: none given"),
        (lambda: Contrast([["image"]]), "not two modalities"),
        (lambda: Classify("label", 1, ["image"]), "classes 1, smoothing 0: at least 2"),
        (lambda: Classify("label", C, []), "one, or two that are fused"),
        (lambda: MultiTask(Towers(image=ConvTower([8])), {}), "objectives: none given"),
        (lambda: multitask("words", chunks=2), "chunks 2: no term of MultiTask contrasts"),
        (lambda: multitask("contrast")(batch(4, modalities=("image",))), "the data has no modality 'text'"),
        (
            lambda: multitask(more={"k": Classify("lable", C, ["text"])})(batch(4)),
            "the data has no 'lable', only label",
        ),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="the adapter has 16 tokens, and PatchTower 4"):
        multitask("kind", more={"m": MaskedTokens("image", PatchAdapter([8, 8], 2))})(batch(4))
