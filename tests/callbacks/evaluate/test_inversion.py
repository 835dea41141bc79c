"""Retrieval within a modality against loops over rows, and inversion through encoders whose answer is known."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.callbacks import IntraModal, Inversion, Retrieval
from descant.datamodules.corpora.emoji import Emoji
from descant.modules.core.batch import Batch
from descant.modules.evaluation.inversion import ModalityInversion, rows_of_other_keys
from descant.modules.evaluation.metrics import average_precision
from descant.modules.tokenizers.text import WordTokenizer
from descant.modules.towers import BagTower, ConvTower, PatchTower, TextTower, Tower, Towers
from descant.recipes import Contrastive
from tests.callbacks.evaluate.test_embeddings import Data, Recipe, evaluate, make
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps


class Plain(nn.Module):
    """A tower whose tokens are what it embeds."""

    def __init__(self, length: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4)
        self.register_buffer("positions_TD", torch.zeros(length, 4))

    def embed(self, x: Tensor) -> Tensor:
        return self.table(x)

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return h_BTD


class Invertible(Recipe):
    """Any direction can be said: the embedding of a text is the direction of the sum of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleDict({"image": Plain(), "text": Plain()})
        self.asked: list[str] = []

    def encode_embeddings(self, h_BTD: Tensor, mask_BT: Tensor, modality: str) -> Tensor:
        self.asked.append(modality)
        return F.normalize(h_BTD.sum(dim=1) @ self.turn, dim=-1)


class ResumableLog(Data):
    tokenizer = WordTokenizer(["a", "picture", "of"], length=8)


def data(sets: int = 1, prompts: bool = True) -> ResumableLog:
    """Sets whose rows' content is in a bank of 60, with labels that the pictures show a little."""
    generator = torch.Generator().manual_seed(9)
    ids_CPT = F.one_hot(torch.arange(3), 4)[:, None].float() + 0.2 * torch.randn(3, 2, 4, generator=generator)
    whole = {f"s{k}": make(n=40, seed=k, keys=12, signal=2.0) for k in range(sets)}
    for k, batch in enumerate(whole.values()):
        batch.index = 2000 * (k + 1) + torch.arange(40)
    bank = make(n=60, seed=7, keys=12, signal=2.0)
    code_KD = 1.2 * torch.randn(12, 4, generator=generator)
    for batch in (*whole.values(), bank):
        batch.inputs["image"] += code_KD[batch.content_id]
    bank.index[:5] = whole["s0"].index[:5]  # rows of a set that are in the bank too
    bank.targets["group"][3] = -1
    return ResumableLog(whole, bank, ids_CPT if prompts else None)


def by_hand(whole: Batch, bank: Batch, target: str | None, at: list[int] | None = None) -> float:
    z, z_bank = (F.normalize(b.inputs["image"], dim=-1) for b in (whole, bank))
    label, label_bank = (b.content_id if target is None else b.targets[target] for b in (whole, bank))
    found = []
    for q in range(len(whole)) if at is None else at:
        if not whole.present["image"][q] or label[q] < 0:
            continue
        gallery = [g for g in range(len(bank)) if bank.present["image"][g] and bank.index[g] != whole.index[q]]
        order = sorted(gallery, key=(-z[q] @ z_bank.T).tolist().__getitem__)
        ranks = [r for r, g in enumerate(order, start=1) if label_bank[g] == label[q]]
        if ranks:
            found.append(sum(number / r for number, r in enumerate(ranks, start=1)) / len(ranks))
    return sum(found) / len(found)


# natively ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_intra_modal_retrieval_equals_loops_over_rows(stage: str) -> None:
    told = data(sets=2)
    values = evaluate(told, IntraModal(target="group"), stage=stage)
    assert sorted(values) == ["s0/map_group_image", "s0/map_image", "s1/map_group_image", "s1/map_image"]
    for name, whole in told.sets.items():
        assert values[f"{name}/map_image"] == pytest.approx(by_hand(whole, told.bank, None), abs=ulps(8, F32))
        assert values[f"{name}/map_group_image"] == pytest.approx(by_hand(whole, told.bank, "group"), abs=ulps(8, F32))


def test_a_query_does_not_find_itself() -> None:
    told = data()
    told.bank = told.sets["s0"]
    alone = told.sets["s0"].content_id.unique(return_counts=True)[1]
    assert (alone > 1).any()
    assert evaluate(told, IntraModal())["s0/map_image"] == pytest.approx(
        by_hand(told.bank, told.bank, None), abs=ulps(8, F32)
    )
    told.bank.content_id[:] = torch.arange(40)  # nobody else has its content: no query counts, and nothing is logged
    assert evaluate(told, IntraModal()) == {}


def test_other_modalities_and_named_sets() -> None:
    values = evaluate(data(sets=2), IntraModal("text", sets=["s1"]))
    assert list(values) == ["s1/map_text"]
    with pytest.raises(ValueError, match=r"^IntraModal: no set 'vendor'; this evaluation has s0, s1$"):
        evaluate(data(sets=2), IntraModal(sets=["vendor"]))
    with pytest.raises(ValueError, match=r"^IntraModal: no target 'kind' in the data; it has group$"):
        evaluate(data(), IntraModal(target="kind"))
    with pytest.raises(ValueError, match=r"^IntraModal: no embedding of 'audio'; the recipe has image, text$"):
        evaluate(data(), IntraModal("audio"))


# through inversion ---------------------------------------------------------------------------------------------


def test_exact_inversion_equals_native_retrieval_and_its_sham_is_at_chance() -> None:
    told, recipe = data(sets=2), Invertible()
    evaluator = Inversion(target="group", oti=ModalityInversion(steps=400, lr=0.05))
    values = evaluate(told, evaluator, stage="test", recipe=recipe)
    for name, whole in told.sets.items():
        found = {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(name)}
        assert found["oti_cos"] > 0.999 and found["oti_monotone"] > 0.7
        for suffix, target in (("", None), ("_group", "group")):
            native = by_hand(whole, told.bank, target)
            assert found[f"native_map{suffix}"] == pytest.approx(native, abs=ulps(8, F32))
            # the inverse is at a cosine of 0.999 or more: some neighbours change places
            assert found[f"oti_map{suffix}"] == pytest.approx(native, abs=0.01)
            assert found[f"oti_gain{suffix}"] == pytest.approx(found[f"oti_map{suffix}"] - native, abs=ulps(8, F32))
            assert native > found[f"oti_map{suffix}_chance"] + 0.05
            # thirty queries whose precision varies by 0.3: a standard error of 0.05
            assert found[f"oti_map{suffix}_sham"] == pytest.approx(found[f"oti_map{suffix}_chance"], abs=0.06)
        assert found["zeroshot_group"] > 0.5
        # a change of place in thirty is 0.03
        assert found["zeroshot_group_oti"] == pytest.approx(found["zeroshot_group"], abs=0.06)
        z = {m: F.normalize(x, dim=-1)[whole.present[m]] for m, x in whole.inputs.items()}
        keys = whole.content_id[whole.present["image"]], whole.content_id[whole.present["text"]]
        named = average_precision(z["image"], keys[0], z["text"], keys[1]).nanmean()
        assert found["names_map"] == pytest.approx(float(named), abs=ulps(8, F32))
        assert found["names_map_oti"] == pytest.approx(float(named), abs=0.02)  # as of the inverses above
        assert len(found) == 16
    assert set(recipe.asked) == {"text"}


def test_a_limit_spaces_the_queries_evenly() -> None:
    told = data()
    whole = told.sets["s0"]
    rows = whole.index.argsort()
    rows = rows[whole.present["image"][rows]]
    at = rows[:: -(-len(rows) // 10)].tolist()
    assert 5 <= len(at) <= 10
    values = evaluate(told, Inversion(limit=10, oti=ModalityInversion(steps=1)), recipe=Invertible())
    assert values["s0/native_map"] == pytest.approx(by_hand(whole, told.bank, None, at), abs=ulps(8, F32))


def test_texts_through_pseudo_patches() -> None:
    """The gallery are the other texts of the set, none of them of equal content."""
    told, recipe = data(), Invertible()
    evaluator = Inversion(target="group", oti=ModalityInversion(steps=1), ovi=ModalityInversion(steps=400, lr=0.05))
    values = evaluate(told, evaluator, recipe=recipe)
    assert values["s0/ovi_cos"] > 0.999
    whole = told.sets["s0"]
    z, label = F.normalize(whole.inputs["text"], dim=-1), whole.targets["group"]
    at = whole.present["text"].nonzero().flatten().tolist()
    found = []
    for q in at:
        order = sorted(
            (g for g in at if whole.content_id[g] != whole.content_id[q]), key=(-z[q] @ z.T).tolist().__getitem__
        )
        ranks = [r for r, g in enumerate(order, start=1) if label[g] == label[q]]
        found += [sum(k / r for k, r in enumerate(ranks, start=1)) / len(ranks)] if ranks else []
    assert values["s0/native_map_group_text"] == pytest.approx(sum(found) / len(found), abs=ulps(8, F32))
    assert values["s0/ovi_map_group"] == pytest.approx(sum(found) / len(found), abs=0.01)  # as of the inverses above
    assert "s0/ovi_map" not in values and "s0/ovi_gain_group" in values and "s0/ovi_map_group_sham" in values
    assert set(recipe.asked) == {"text", "image"}


def test_rows_of_other_keys_are_a_function_of_the_keys() -> None:
    key_N = torch.randint(9, (50,), generator=torch.Generator().manual_seed(0))
    key_N = key_N.sort().values
    given = dict(zip(key_N.tolist(), key_N[rows_of_other_keys(key_N)].tolist(), strict=True))
    assert all(a != b for a, b in given.items())
    assert sorted(given.values()) == sorted(given)  # one cycle: every content is somebody's other
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    moved = key_N[order]
    assert dict(zip(moved.tolist(), moved[rows_of_other_keys(moved)].tolist(), strict=True)) == given


def test_validations_of_a_fit_run_only_with_validate() -> None:
    for validate in (False, True):
        recipe = Invertible()
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            callbacks=[Inversion(oti=ModalityInversion(steps=1), validate=validate), IntraModal(validate=validate)],
            max_epochs=1,
            accelerator="cpu",
            enable_checkpointing=False,
            **options,
        )
        told = data()
        trainer.fit(recipe, datamodule=told)
        assert bool(recipe.asked) == ("s0/map_image" in trainer.callback_metrics) == validate
        trainer.test(recipe, datamodule=told, verbose=False)
        assert {"s0/map_image", "s0/oti_cos"} <= trainer.callback_metrics.keys()


def on_a_rank(rank: int) -> dict[str, float]:
    evaluators = Inversion(target="group", oti=ModalityInversion(steps=60)), IntraModal(target="group")
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    return evaluate(data(), *evaluators, recipe=Invertible(), **options)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_one() -> None:
    evaluators = Inversion(target="group", oti=ModalityInversion(steps=60)), IntraModal(target="group")
    wanted = evaluate(data(), *evaluators, recipe=Invertible())
    for values in run_ranks(2, on_a_rank):
        # of pieces that go through other kernels; a step of Adam magnifies rounding
        assert values == pytest.approx(wanted, abs=ulps(84, F32))


# with recipes and data -----------------------------------------------------------------------------------------


def clip(image: Tower | None = None, text: Tower | None = None) -> Contrastive:
    torch.manual_seed(0)
    image = image or PatchTower(size=32, patch=16, width=16, depth=1, heads=2)
    text = text or TextTower(vocab=8192, width=16, depth=1, heads=2, length=24, std=0.5)
    return Contrastive(Towers(image=image, text=text), width=16)


def test_evaluation_changes_nothing_in_the_recipe() -> None:
    model = clip()
    before = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    evaluator = Inversion(
        target="subgroup",
        sets=["vendor"],
        limit=16,
        oti=ModalityInversion(steps=100),
        ovi=ModalityInversion(steps=100, tokens=2),
    )
    plain = evaluate(Emoji(tiny=True), Retrieval(), recipe=model, stage="test")
    values = evaluate(
        Emoji(tiny=True), evaluator, IntraModal(target="subgroup"), Retrieval(), recipe=model, stage="test"
    )
    assert {key: values[key] for key in plain} == plain
    after = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    assert after == before and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert values["vendor/oti_monotone"] == values["vendor/ovi_monotone"] == 1
    assert "concept/oti_cos" not in values and "concept/map_subgroup_image" in values


def test_refusals_in_one_line() -> None:
    with pytest.raises(ValueError, match="limit 1: the sham needs another query"):
        Inversion(limit=1)
    with pytest.raises(ValueError, match=r"has 2 places \{\}; one is needed"):
        Inversion(template="{} and {}")
    with pytest.raises(ValueError, match=r"^Inversion needs the protocol Inverts .*; Recipe lacks it, Contrastive"):
        evaluate(data(), Inversion())
    with pytest.raises(ValueError, match=r"^Inversion needs tokenizer\(\) of the data module; Data has none$"):
        evaluate(Data({"val": make()}, bank=make()), Inversion(), recipe=Invertible())
    with pytest.raises(ValueError, match=r"^tower text: .*which BagTower lacks; TextTower and PatchTower have them$"):
        evaluate(Emoji(tiny=True), Inversion(), recipe=clip(text=BagTower(8192, 16)), stage="test")
    with pytest.raises(ValueError, match=r"^tower image: .*which ConvTower lacks; TextTower and PatchTower have them$"):
        evaluator = Inversion(ovi=ModalityInversion(steps=1))
        evaluate(Emoji(tiny=True), evaluator, recipe=clip(image=ConvTower(widths=[8], stem=8)), stage="test")
    with pytest.raises(ValueError, match="target: 'kind' is not one of group"):
        evaluate(data(), Inversion(target="kind"), recipe=Invertible())
