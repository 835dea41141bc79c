"""Mono-InternVL-1.5 (arXiv 2507.12566): text to the bit, gathering equals blending, and text calls no visual expert.

Letters: B samples, S tokens of one, T tokens of a row, N tokens, D width, P prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from descant.callbacks import Resume, Stages
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.combined.stages import StageData, StagedData
from descant.datamodules.tasks.denoised_texts import DenoisedTexts
from descant.datamodules.tasks.descriptions import Descriptions
from descant.modules.adaptation.grow import Grow
from descant.modules.adaptation.visual_experts import BeginText, CopyToVisualExperts
from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM, Sampling, generate
from descant.modules.language.decode_layers import DecodeLayer
from descant.modules.language.model import Layer, apply_rope
from descant.modules.moe import Marks, ModalityLinear, VisualExperts
from descant.modules.moe.modality_linear import kind_order, permuted_kinds, text_weight
from descant.modules.tokenizers.text import ByteTokenizer
from descant.modules.towers import PatchEmbed, Towers
from descant.modules.transforms.denoisers import MixtureOfDenoisers, Suffix
from descant.recipes import Stage, Staged, VisionLanguage
from tests._suites import GradientExact, MissingModalities, Ranks
from tests.callbacks.checkpoints.test_resume import equal, fit, point, state
from tests.modules.adaptation.test_extend import saved
from tests.recipes.test_vision_language import Patches, batch, dialogue, sees

V, D = 20, 16
#: Of gathering and of computing both and blending, whose sums are of 16 to 48 numbers.
BLENDED: Any = {"rtol": 0.0, "atol": 1e-6}
DELTA = "experts|towers|projector"


def model(attention: bool = True) -> CausalLM:
    """A model whose experts are no copies any more."""
    torch.manual_seed(0)
    lm = CausalLM(V, D, 2, 2, key_heads=1, hidden=24, length=64, visual=VisualExperts(attention))
    with torch.no_grad():
        for n, (name, p) in enumerate(lm.named_parameters()):
            p.copy_((p * 5 if p.ndim > 1 else p).roll(n + 1 if "experts" in name else 0, dims=0))
    return lm


def ids(rows: int = 3, tokens: int = 9) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(1, V, (rows, tokens), generator=g), torch.randint(0, 2, (rows, tokens), generator=g)


# the equation ---------------------------------------------------------------------------------------------------------


def both(layer: torch.nn.Module, x: Tensor, m: Tensor) -> Tensor:
    """``(1 - m) W^0 x + m W^1 x``, as the release computes it; of a plain layer ``W x``."""
    if not isinstance(layer, ModalityLinear):
        return layer(x)
    return (1 - m) * F.linear(x, layer.weight) + m * F.linear(x, layer.experts[0])


def blended(lm: CausalLM, h_BTD: Tensor, kind_BT: Tensor) -> Tensor:
    """The model with all weights computed on all tokens."""
    m, (B, T, _) = kind_BT[..., None].to(h_BTD), h_BTD.shape
    rope = lm.rope(torch.arange(T).expand(B, T))
    for layer in lm.layers:
        assert isinstance(layer, Layer)
        x = both(layer.qkv, layer.norm_1(h_BTD), m).view(B, T, -1, layer.head_width).transpose(1, 2)
        qk, v = x.split([layer.heads + layer.key_heads, layer.key_heads], dim=1)
        q, k = apply_rope(qk, rope).split([layer.heads, layer.key_heads], dim=1)
        k, v = (y.repeat_interleave(layer.heads // layer.key_heads, dim=1) for y in (k, v))
        score = (q @ k.transpose(2, 3) / layer.head_width**0.5).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
        h_BTD = h_BTD + both(layer.out, (score.softmax(dim=3) @ v).transpose(1, 2).reshape(h_BTD.shape), m)
        x, swiglu = layer.norm_2(h_BTD), list[Tensor]()
        for kind in (0, 1):
            assert isinstance(layer.gate_up, ModalityLinear) and isinstance(layer.down, ModalityLinear)
            gate, up = F.linear(x, layer.gate_up.of(kind)).chunk(2, dim=-1)
            swiglu.append(F.linear(F.silu(gate) * up, layer.down.of(kind)))
        h_BTD = h_BTD + (1 - m) * swiglu[0] + m * swiglu[1]
    return lm.norm(h_BTD)


@pytest.mark.parametrize("attention", [True, False])
def test_gathering_is_computing_both_and_blending_in_outputs_and_gradients(attention: bool) -> None:
    id_BT, kind_BT = ids()
    found = []
    for function in (lambda lm, h: lm(h, marks=Marks(kind_BT)), lambda lm, h: blended(lm, h, kind_BT)):
        lm = model(attention)
        h_BTD = lm.embed(id_BT).detach().requires_grad_()
        out_BTD = function(lm, h_BTD)
        (out_BTD * torch.linspace(-1, 1, out_BTD.numel()).view_as(out_BTD)).mean().backward()
        assert h_BTD.grad is not None
        found.append([out_BTD, h_BTD.grad, *(p.grad for p in lm.layers.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 2 + (2 * (4 + 2 + 4) if attention else 2 * (4 + 2 + 2))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **BLENDED)


class TestVisualExperts(GradientExact, MissingModalities, Ranks):
    """Of packed samples, some without an image: each alone, with all weights computed on all tokens."""

    def recipe(self) -> VisionLanguage:
        lm = model()
        torch.manual_seed(0)
        return VisionLanguage(**sees(lm, Towers(image=Patches())))

    def batch(self) -> Batch:
        return batch()

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        total, samples = torch.zeros((), dtype=torch.float64), 0
        for n in range(len(batch)):
            if not batch.present["text"][n] or not batch.inputs["loss_mask"][n].any():
                continue
            h_TD, learned = dialogue(recipe, batch, n)
            image = batch.inputs["text"][n].eq(recipe.image_token).any() and batch.present["image"][n]
            kind_T = torch.zeros(len(h_TD), dtype=torch.long)
            kind_T[1:5] = int(image)  # four tokens behind <bos>
            logits_TV = recipe.lm.logits(blended(recipe.lm, h_TD[None], kind_T[None]))[0]
            at = [t for t, i in enumerate(learned) if i >= 0]
            wanted = torch.tensor([learned[t] for t in at])
            total, samples = total + F.cross_entropy(logits_TV[[t - 1 for t in at]], wanted), samples + 1
        unused = 0 * sum(p.sum() for p in recipe.parameters())
        return {"answer": total / samples + unused}


# text -----------------------------------------------------------------------------------------------------------------


def of_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if "experts" not in name}


def test_a_step_of_text_calls_no_visual_expert() -> None:
    id_BT, kind_BT = ids()
    lm, plain = model(), CausalLM(V, D, 2, 2, key_heads=1, hidden=24, length=64)
    plain.load_state_dict(of_text(lm.state_dict()))
    flops = []
    for each in (plain, lm):
        with FlopCounterMode(display=False) as counter:
            out = each(each.embed(id_BT), marks=Marks(torch.zeros_like(kind_BT)))
            out.square().mean().backward()
        flops.append((out, counter.get_total_flops()))
    assert torch.equal(flops[0][0], flops[1][0]) and flops[0][1] == flops[1][1] > 0
    grads = {name: p.grad for name, p in lm.named_parameters()}
    assert all(g is not None and not g.any() for name, g in grads.items() if "experts" in name), "so that ranks agree"
    assert all(torch.equal(p.grad, grads[name]) for name, p in plain.named_parameters())  # type: ignore[arg-type]
    for p in (p for name, p in lm.named_parameters() if "experts" in name):
        p.data.fill_(torch.nan)
    with torch.no_grad():
        assert torch.equal(lm(lm.embed(id_BT)), plain(plain.embed(id_BT))), "without marks all is text"
        made = [generate(each, id_BT, new=5, sampling=Sampling(temperature=0)).token_RN for each in (plain, lm)]
        assert torch.equal(*made) and DecodeLayer(lm.blocks()[0]).plain, "and generation is on its fast path"


class Losses(L.Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Batch, i: int) -> None:
        self.values.append(float(out["loss"]))


def staged(folder: Path, path: Path | None = None) -> tuple[Staged, list[float]]:
    """Two steps on texts, three on captions, whose experts, tower and projector alone train."""
    torch.manual_seed(0)
    lm = CausalLM(369, 8, 1, 2, length=128, visual=VisualExperts(attention=True))
    towers = Towers(image=PatchEmbed(24, 8, 8))
    stages = {"text": Stage(train="weight"), "captions": Stage(train=DELTA, begin=[CopyToVisualExperts()])}
    net = VisionLanguage(towers=towers, lm=lm, image_token=264, answer_token=265)
    whole = Staged(net, stages, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.5))
    tasks = {"vendor": Suffix(0.5, uniform=False)}
    texts = DenoisedTexts(60, MixtureOfDenoisers([Suffix()]), tasks=dict(tasks), tiny=True, batch_size=8)
    seen: dict[str, Any] = {"size": 24, "length": 64, "parts": ["group"], "text": ByteTokenizer(64)}
    both = Mixture(
        {"texts": texts, "captions": Descriptions(**seen)}, {"texts": 1, "captions": 3}, batch_size=8, tiny=True
    )
    data = StagedData({"text": StageData(texts, 1, 2), "captions": StageData(both, 1, 3)})
    losses = Losses()
    options: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 0, "path": path}
    fit(folder, Stages(), losses, Resume(every=1, keep=9), net=whole, data=data, **options)
    return whole, losses.values


def test_text_is_what_it_was_to_the_bit_after_training_and_a_resumed_run_too(tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("whole")
    whole, losses = staged(folder)
    before = torch.load(folder / "stages/text.ckpt", weights_only=True)["state_dict"]
    after, lm, plain = whole.state_dict(), whole.lm, CausalLM(369, 8, 1, 2, length=128)
    plain.load_state_dict(of_text({n[9:]: x for n, x in before.items() if n.startswith("inner.lm.")}))
    id_BT = torch.randint(6, 264, (4, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert isinstance(lm, CausalLM)
        assert torch.equal(lm.logits(lm(lm.embed(id_BT))), plain.logits(plain(plain.embed(id_BT))))
    moved = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert {name for name in before if "experts" in name} == {name for name in moved if ".lm." in name}
    for cut in (2, 4):  # before the first caption, and between two
        again, other = staged(tmp_path_factory.mktemp("cut"), point(folder, cut))
        assert equal(state(again), state(whole)) and other == losses[cut:]


def test_a_run_on_text_gives_its_weights_to_both_kinds(tmp_path: Path) -> None:
    torch.manual_seed(5)
    lm = CausalLM(V, D, 2, 2, key_heads=1, hidden=24, length=64)
    recipe = TestVisualExperts().recipe()
    before = recipe.state_dict()
    eyes = {name: x.clone() for name, x in before.items() if not name.startswith("lm.")}
    BeginText(saved(tmp_path / "run", VisionLanguage(lm=lm, answer_token=4)), "last").apply(recipe)
    for name, x in recipe.lm.state_dict().items():
        assert torch.equal(x, lm.state_dict()[text_weight(name) if "experts" in name else name]), name
    assert equal(eyes, {name: before[name] for name in eyes})


# generation, controls, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1])
def test_generated_with_a_cache_as_without(kind: int) -> None:
    """New tokens are words, or with ``documents`` all are of the experts."""
    lm, (id_PT, kind_PT) = model().eval(), ids()
    wide = torch.cat([kind_PT, torch.full((3, 1), kind)], dim=1)
    made = generate(lm, id_PT, new=6, sampling=Sampling(temperature=0), marks=Marks(wide)).token_RN
    row_PT, all_PT = id_PT, kind_PT
    for _ in range(6):
        h_PTD = lm(lm.embed(row_PT), marks=Marks(all_PT))
        row_PT = torch.cat([row_PT, lm.logits(h_PTD)[:, -1:].argmax(dim=2)], dim=1)
        all_PT = torch.cat([all_PT, wide[:, -1:]], dim=1)
    assert torch.equal(made, row_PT[:, 9:])


def test_controls_serve_other_tokens() -> None:
    id_BS, real_BS = torch.arange(12).view(2, 6), torch.arange(6) < torch.tensor([[6], [4]])
    kind_BS, seed_B = ((id_BS % 6 > 0) & (id_BS % 6 < 3)).long(), torch.tensor([7, 11])
    other_BS = permuted_kinds(kind_BS, real_BS, seed_B)
    assert torch.equal(other_BS.sum(dim=1), kind_BS.sum(dim=1)) and not (other_BS.bool() & ~real_BS).any()
    assert not torch.equal(other_BS, kind_BS) and torch.equal(
        other_BS[1:], permuted_kinds(kind_BS[1:], real_BS[1:], seed_B[1:])
    )
    kinds = [int(permuted_kinds(kind_BS[:1], real_BS[:1], torch.tensor([s]))[0, 5]) for s in range(600)]
    assert abs(sum(kinds) / 600 - 1 / 3) < 4 * (2 / 9 / 600) ** 0.5  # four standard errors
    text = torch.zeros(2, 6, dtype=torch.long)
    for of in (VisualExperts(sham="permute"), VisualExperts(documents=True), VisualExperts()):
        assert torch.equal(of(text, real_BS, seed_B), text) and of.sham.calls == 1, "text has no expert in any"


def test_refusals() -> None:
    for make, line in (
        (lambda: ModalityLinear(4, 4, kinds=1), "kinds 1: 2 is the least"),
        (lambda: kind_order(Marks(torch.tensor([2])), 2), "a token of kind 2; there are 0 to 1"),
        (
            lambda: CopyToVisualExperts().require(VisionLanguage(lm=CausalLM(V, 8, 1, 2), answer_token=4)),
            "has no visual experts",
        ),
        (lambda: Grow(depth=1).require(VisionLanguage(lm=model(), answer_token=4)), "visual experts cannot grow"),
    ):
        with pytest.raises(ValueError, match=line):
            make()
