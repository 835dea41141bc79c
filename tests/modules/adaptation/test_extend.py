"""Extend: a masked model begins with the weights of one of fewer modalities. Letters: B samples, T tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from descant.modules.adaptation.inherit import Begin, Extend
from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import Adapter, Adapters, PatchAdapter
from descant.modules.masking.any_to_any import AnyToAnyDecoder
from descant.modules.masking.code_adapter import CodeAdapter
from descant.modules.masking.corruptions import UniformMask
from descant.modules.masking.decoders import CrossDecoder, Decoder, JointDecoder
from descant.modules.masking.discrete_adapters import CategoryAdapter, TokenAdapter
from descant.modules.masking.reductions import MeanOfModalities
from descant.modules.masking.sequence_adapter import SequenceAdapter
from descant.modules.masking.two_budgets import DirichletPair, TwoBudgets
from descant.modules.tokenizers.values import PaletteTokens, ScalarTokens
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup.optim import make_optimizer
from descant.recipes import Masked

OLD = ("image", "palette", "text", "codes")
NEW = ("dominant", "facts")


def recipe(new: bool, seed: int, decoder: Decoder | None = None, ordered: bool = True, **options: Any) -> Masked:
    torch.manual_seed(seed)
    text = SequenceAdapter(9, 8) if ordered else TokenAdapter(9, 8)
    facts = CodeAdapter(ScalarTokens([0, 3], bins=4))
    more: dict[str, Adapter] = {"dominant": CodeAdapter(PaletteTokens(2, 4)), "facts": facts}
    adapters = Adapters(
        image=PatchAdapter([8, 8], 2),
        palette=CategoryAdapter(3, [8, 8], 2, embedding=4),
        text=text,
        others={"codes": TokenAdapter(7, 9, pad=None), **(more if new else {})},
    )
    if ordered:
        pair = DirichletPair(dict.fromkeys(OLD, 0.5), {"palette": 0.5, "text": 0.5, "codes": 0.5})
        both = DirichletPair(dict.fromkeys(OLD + NEW, 0.5), {"text": 0.5, "facts": 0.5, "dominant": 0.5})
        options.setdefault("corruption", TwoBudgets(8, 6, [pair, both] if new else [pair, pair], sequences=["text"]))
    options.setdefault("corruption", UniformMask(0.5))
    options.setdefault("reduction", MeanOfModalities())
    return Masked(adapters, Trunk(24, 2, 3), decoder or AnyToAnyDecoder(12, 2, 2), **options)


def batch(rows: int = 12) -> Batch:
    """Nothing has a new modality, whose inputs are what absent ones may be."""
    g = torch.Generator().manual_seed(0)
    inputs = {
        "image": torch.randn(rows, 3, 8, 8, generator=g),
        "palette": torch.randint(0, 3, (rows, 8, 8), generator=g),
        "text": torch.randint(1, 9, (rows, 8), generator=g),
        "codes": torch.randint(0, 7, (rows, 9), generator=g),
        "dominant": torch.zeros(rows, 2, 3),
        "facts": torch.zeros(rows, 2),
    }
    there = torch.ones(rows, dtype=torch.bool)
    present = {m: there & (m in OLD) for m in inputs}
    return Batch(inputs, present, index=torch.arange(rows), rng_seed=torch.arange(rows) * 7919 + 13)


def new(name: str) -> bool:
    """Whether a weight is of a new modality, in its adapter or in the decoder."""
    return not set(NEW).isdisjoint(name.split("."))


def saved(folder: Path, model: torch.nn.Module) -> Path:
    """A run as ``fit`` leaves it."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": "descant.recipes.Masked"}}))
    torch.save({"state_dict": model.state_dict()}, folder / "checkpoints/last.ckpt")
    return folder


def fitted(model: Masked) -> Masked:
    table: Any = model.adapters["facts"]
    table.tokenizer.fit(torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 0.0], [5.0, 1.0]]))
    return model


@pytest.mark.parametrize(("make", "ordered"), [(AnyToAnyDecoder, True), (CrossDecoder, False), (JointDecoder, False)])
def test_right_after_extension_old_outputs_are_the_same_to_the_bit(tmp_path: Path, make: Any, ordered: bool) -> None:
    old = recipe(False, 1, make(12, 2, 2), ordered)
    run, b = saved(tmp_path / "run", old), batch()
    model = fitted(recipe(True, 2, make(12, 2, 2), ordered, adapt=[Extend(run, "last")]))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.configure_model()
    state = model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in old.state_dict().items())
    added = state.keys() - old.state_dict().keys()
    assert all(torch.equal(state[name], before[name]) for name in added)
    assert added and all(map(new, added))
    same = old.corruption  # the mixture of the new one has another component
    with torch.no_grad():
        wanted, found = old.losses(b, same), model.losses(b, same)
        assert all(torch.equal(found[name].value, term.value) for name, term in wanted.items())
        assert all(torch.equal(found[name].valid, term.valid) for name, term in wanted.items())  # type: ignore[arg-type]
        shown, made = old.reconstruct(b, same), model.reconstruct(b, same)
        assert all(torch.equal(made[m].prediction, x.prediction) for m, x in shown.items()) and shown
        assert all(torch.equal(z, model.embed(b)[m]) for m, z in old.embed(b).items() if m in OLD)


def test_an_absent_modality_has_no_target_and_no_gradient_and_both_are_trained(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", recipe(False, 1))
    model, b = fitted(recipe(True, 2, adapt=[Extend(run, "last")])), batch()
    model.configure_model()
    terms = model.terms(b)
    assert all(bool(terms[f"mask/{m}"].valid.any()) == (m in OLD) for m in (*OLD[1:], *NEW))  # type: ignore[union-attr]
    model.step(terms, b).total.backward()
    each = dict(model.named_parameters())
    moved = {name for name, p in each.items() if p.grad is not None and bool(p.grad.any())}
    assert moved and not any(map(new, moved))
    optimizer = make_optimizer(torch.optim.AdamW, model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in trained for p in each.values()) and not optimizer.state
    for m in NEW:
        b.present[m][::2] = True
    model.zero_grad()
    model.step(model.terms(b), b).total.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for name, p in each.items() if new(name))


def test_ids_of_modalities_and_columns_are_apart() -> None:
    model = fitted(recipe(True, 0))
    adapters: dict[str, Any] = model.adapters.each()
    rows = [adapters[m].table.weight for m in ("text", "codes", *NEW)]
    assert len({x.data_ptr() for x in rows}) == len(rows)
    assert sum(map(len, rows)) == len(torch.cat(rows).unique(dim=0))
    for m, columns, codes in (("dominant", 6, 4), ("facts", 2, 4)):
        place_T = torch.arange(columns)
        real_TC = adapters[m].scores(torch.randn(columns, 12), place_T).squeeze(1).isfinite()
        block_T = place_T // (2 if m == "dominant" else 1)  # three channels of two colours
        assert torch.equal(real_TC, torch.arange(real_TC.shape[1]) // codes == block_T[:, None])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda adapt: recipe(False, 0, adapt=adapt), "no modality beside image, palette, text, codes, which the run"),
        (
            lambda adapt: Masked(
                Adapters(image=PatchAdapter([8, 8], 2), sketch=PatchAdapter([8, 8], 2), **LATER),
                adapt=adapt,
                encoder=Trunk(24, 2, 3),
            ),
            "sketch is new, and stands before one of image, palette, text, codes; give it in others",
        ),
        (
            lambda adapt: recipe(True, 0, AnyToAnyDecoder(16, 2, 2), adapt=adapt),
            r"not the weights of this Masked: .*12",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path: Path, model: Any, words: str) -> None:
    run = saved(tmp_path / "run", recipe(False, 1))
    with pytest.raises(ValueError, match=words):
        model([Extend(run, "last")]).configure_model()
    with pytest.raises(ValueError, match="dominant"):
        recipe(True, 0, adapt=[Begin(run, "last")]).configure_model()


LATER: dict[str, Any] = {
    "palette": CategoryAdapter(3, [8, 8], 2),
    "text": TokenAdapter(9, 8),
    "others": {"codes": TokenAdapter(7, 9, pad=None)},
}
