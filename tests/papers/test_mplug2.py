"""mPLUG-2 (arXiv 2302.00402): universal layers against loops, modules by objective, and momentum labels.

Letters: B samples, T tokens, S tokens that are attended to, D width.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.distill.distill import Distill, SoftLabels
from descant.modules.fusion.cross_encoder import FusionLayers
from descant.modules.fusion.universal import UniversalLayers, role_swap
from descant.modules.objectives.base import TaskObjective
from descant.modules.objectives.classify import Classify
from descant.modules.objectives.contrast import Contrast
from descant.modules.objectives.match import Match
from descant.modules.towers import Tokens, Tower, Towers
from descant.recipes import MultiTask, TeacherAverage
from tests._suites import GradientExact, MissingModalities, Ranks, Resume, ShamNeutral
from tests._suites.data import CLASSES, samples
from tests.recipes.test_multitask import Calls, Data, gradients, multitask
from tests.recipes.test_multitask import samples as pictures
from tests.step_toy import QUIET
from tests.tolerance import F64, rounding

PAIR = ["image", "text"]


class EachNumber(Tower):
    """Every number of a sample is a token; the last is padding where it is negative."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width, self.inward = width, nn.Linear(1, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        real_BT = torch.ones_like(x, dtype=torch.bool)
        real_BT[:, -1] = x[:, -1] >= 0
        place_T1 = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype, device=x.device)[:, None]
        return Tokens(self.inward(x[..., None]).tanh() * (1 + place_T1), real_BT)


def objectives() -> dict[str, TaskObjective]:
    kinds = {m: Classify("label", CLASSES, [m]) for m in PAIR}
    return {"name": kinds["text"], "drawing": kinds["image"], "contrast": Contrast([PAIR])}


def model(**options: Any) -> MultiTask:
    torch.manual_seed(0)
    towers = Towers(others={m: EachNumber() for m in PAIR})
    layers = {name: options.pop(name) for name in list(options) if name in ("latents", "depth", "sham", "output")}
    universal = UniversalLayers(8, heads=2, **{"latents": 3, "depth": 2, **layers})
    return MultiTask(towers, options.pop("objectives", objectives()), 8, **{"universal": universal, **options})


# the layers, token by token -------------------------------------------------------------------------------------------


def norm(layer: Any, x_D: Tensor) -> Tensor:
    return (x_D - x_D.mean()) / (x_D.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias


def attended(q_TD: Tensor, k_SD: Tensor, v_SD: Tensor, heads: int) -> Tensor:
    out = []
    for q_D in q_TD:
        parts = []
        for q, k_Sd, v_Sd in zip(q_D.chunk(heads), k_SD.chunk(heads, dim=1), v_SD.chunk(heads, dim=1), strict=True):
            share_S = (k_Sd @ q / math.sqrt(len(q))).exp()
            parts.append((share_S[:, None] * v_Sd).sum(dim=0) / share_S.sum())
        out.append(torch.cat(parts))
    return torch.stack(out)


def layer_of(block: Any, h_TD: Tensor, c_SD: Tensor | None = None) -> Tensor:
    """A layer of one sample without padding, given the tokens c or alone."""
    n_TD = torch.stack([norm(block.norm_1, h_D) for h_D in h_TD])
    q, k, v = (n_TD @ block.qkv.weight.T + block.qkv.bias).chunk(3, dim=1)
    h_TD = h_TD + block.out(attended(q, k, v, block.heads))
    if c_SD is not None:
        q = torch.stack([block.cross["query"](norm(block.cross["norm"], h_D)) for h_D in h_TD])
        kv_SE = torch.stack([block.cross["kv"](norm(block.cross["norm_given"], c_D)) for c_D in c_SD])
        k, v = kv_SE.chunk(2, dim=1)
        h_TD = h_TD + block.cross["out"](attended(q, k, v, block.heads))
    return torch.stack([h_D + block.mlp(norm(block.norm_2, h_D)) for h_D in h_TD])


def behind(layers: Any, h_TD: Tensor, modality: str) -> Tensor:
    """Universal layers of one sample without padding."""
    *first, last = layers.layers
    if modality == "text" or layers.latents_LD is None:
        for block in layers.layers:
            h_TD = layer_of(block, h_TD)
        return torch.stack([norm(layers.norm, h_D) for h_D in h_TD])
    q_LD = layers.latents_LD
    for block in first:
        q_LD = layer_of(block, q_LD, h_TD)
    if layers.output == "latents":
        return torch.stack([norm(layers.norm, q_D) for q_D in layer_of(last, q_LD, h_TD)])
    y_TD = layer_of(last, h_TD, q_LD)  # roles are swapped
    return torch.stack([norm(layers.norm_v, h + norm(layers.norm, y)) for h, y in zip(h_TD, y_TD, strict=True)])


@pytest.mark.parametrize("modality", PAIR)
@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"output": "latents"}, {"latents": None}])
def test_layers_equal_an_explicit_loop(options: dict[str, Any], modality: str) -> None:
    torch.manual_seed(1)
    layers = UniversalLayers(8, heads=2, **{"latents": 3, **options}).build({m: 8 for m in PAIR}).double()
    for p in layers.parameters():
        nn.init.normal_(p, std=0.5)
    h, real = torch.randn(3, 5, 8, dtype=F64), torch.arange(5) < torch.tensor([[5], [3], [0]])
    found = layers(Tokens(h, real), modality)
    for b in range(2):
        n = int(real[b].sum())
        wanted = behind(layers, h[b, :n], modality)
        torch.testing.assert_close(found.h_BTD[b][found.mask_BT[b]], wanted, **rounding(4096, F64))
    assert not found.mask_BT[2].any() and not found.h_BTD[2].any()  # absent


def test_the_swap_is_in_the_last_layer_and_the_image_queries() -> None:
    """A pure function: which tokens have queried which, in float64."""
    h, asked = Tokens(torch.ones(2, 5, 4, dtype=F64), torch.ones(2, 5, dtype=torch.bool)), list[tuple[int, int]]()

    def layer(q: Tokens, c: Tokens) -> Tensor:
        asked.append((q.h_BTD.shape[1], c.h_BTD.shape[1]))
        return q.h_BTD + c.h_BTD.sum(dim=1, keepdim=True)

    y = role_swap(h, torch.zeros(3, 4), [layer] * 3)
    assert asked == [(3, 5), (3, 5), (5, 3)] and torch.equal(y, torch.full((2, 5, 4), 31.0, dtype=F64))  # 1 + 3 * 10


# modules by objective -------------------------------------------------------------------------------------------------


def test_without_fusion_unimodal_outputs_are_the_same_to_the_bit() -> None:
    plain, b = model(), samples(16, *PAIR)
    fused = model(objectives=objectives() | {"match": Match(PAIR)}, fusion=FusionLayers(8, 1, 2))
    fused.load_state_dict(plain.state_dict(), strict=False)
    unasked = model(fusion=FusionLayers(8, 1, 2))
    unasked.load_state_dict(plain.state_dict(), strict=False)
    layers = [Calls(m.fusion.layers[0]) for m in (fused, unasked)]  # type: ignore[union-attr]
    found = [m.double()(b) for m in (plain, fused, unasked)]
    for name in objectives():
        assert all(torch.equal(found[0].terms[name].value, other.terms[name].value) for other in found[1:])
    z = [m.eval().embed(b) for m in (plain, fused, unasked)]
    assert all(torch.equal(z[0][m], other[m]) for m in PAIR for other in z[1:])
    assert layers[0].rows and not layers[1].rows  # fusion that no objective asks for does not run
    assert not any(p.requires_grad for p in unasked.fusion.parameters())  # type: ignore[union-attr]


def test_objectives_choose_their_modules() -> None:
    """Words fused without universal layers, the others behind them: as of recipes that have one alone."""
    b, layers = pictures(), UniversalLayers(16, 2, 2, latents=3)
    chosen = multitask("words", "kind", universal=copy.deepcopy(layers), graph={"words": ["fusion"]}).double()
    none = multitask("words", "kind").double()
    all_behind = multitask("words", "kind", universal=copy.deepcopy(layers)).double()
    for other in (none, all_behind):
        other.load_state_dict(chosen.state_dict(), strict=False)
    terms, towers, behind_all = (m(b).terms for m in (chosen, none, all_behind))
    assert torch.equal(terms["words"].value, towers["words"].value)
    assert torch.equal(terms["kind"].value, behind_all["kind"].value)
    assert not torch.equal(terms["words"].value, behind_all["words"].value)
    assert chosen.universal.modalities == ("image",)
    trained = {name for name, p in chosen.named_parameters() if p.requires_grad}
    assert gradients(chosen, b).keys() == trained


# the suites -----------------------------------------------------------------------------------------------------------


class TestMPLUG2(GradientExact, MissingModalities, Ranks, Resume):
    def recipe(self) -> MultiTask:
        labels = Distill(TeacherAverage(0.9), [SoftLabels(["contrast"])])
        return model(distill=labels)

    def batch(self) -> Batch:
        return samples(16, *PAIR)

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        z: dict[str, dict[int, Tensor]] = {}
        for m in PAIR:
            z[m] = {}
            for b in batch.present[m].nonzero().flatten().tolist():
                h_TD, real_T = (x[0] for x in recipe.towers[m](batch.inputs[m][b : b + 1]))
                h_D = behind(recipe.universal, h_TD[real_T], m).mean(dim=0)
                z[m][b] = F.normalize(recipe.heads[m](h_D[None]), dim=1)[0]
        terms, label = {}, batch.targets["label"]
        for name, m in (("name", "text"), ("drawing", "image")):
            head = recipe.objectives[name].head.projection
            losses = [F.cross_entropy(head(z_D[None]), label[b : b + 1]) for b, z_D in z[m].items()]
            terms[name] = torch.stack(losses).sum() / int(batch.present[m].sum())
        both = [b for b in z["image"] if b in z["text"]]
        scale, losses = recipe.objectives["contrast"].losses[0].scale(), []
        for b in both:
            for m, other in (PAIR, PAIR[::-1]):
                s_G = torch.stack([scale * z[m][b] @ z[other][g] for g in both])
                losses.append((s_G.logsumexp(dim=0) - s_G[both.index(b)]) / 2)
        terms["contrast"] = torch.stack(losses).sum() / len(both)
        return terms


class TestLatentsOfAnotherSample(ShamNeutral, Ranks):
    def recipe(self) -> MultiTask:
        return model()

    def sham(self, mode: Any) -> MultiTask:
        return model(sham=mode)

    def calls(self, recipe: Any) -> int:
        return recipe.universal.sham.calls


# momentum labels ------------------------------------------------------------------------------------------------------


class Watched(L.Callback):
    """Weights and buffers after each micro-batch, of the student and of its average."""

    def __init__(self) -> None:
        self.student, self.average = list[dict[str, Tensor]](), list[dict[str, Tensor]]()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        average = pl_module.distill.teacher.average.state_dict()
        self.student.append({n: x.clone() for n, x in pl_module.state_dict().items() if n in average})
        self.average.append({n: x.clone() for n, x in average.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.on_train_batch_start(trainer, pl_module)


def test_the_average_has_buffers_and_moves_once_an_optimizer_step() -> None:
    distill = Distill(TeacherAverage(0.9), [SoftLabels(["words"])])
    watched, kind = Watched(), Classify("label", 4, ["sketch"])  # the sketch has batch norms
    student = multitask("words", more={"kind": kind}, distill=distill, mix={"words": 0.6}, optimizer=torch.optim.SGD)
    trainer = L.Trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[watched], **QUIET)
    data = Data()
    step = {m: torch.cat([b.step[m] for b in data.batches]) for m in data.batches[0].step}  # of both micro-batches
    data.batches = [replace(b, step=step) for b in data.batches]
    trainer.fit(student, data)
    first, *after = zip(watched.student, watched.average, strict=True)
    buffers, wanted = {name for name, _ in student.named_buffers()}, first[0]
    assert len(after) == 6 and all(torch.equal(first[1][n], x) for n, x in wanted.items())
    assert any(n in buffers and "running_mean" in n and not torch.equal(after[-1][1][n], wanted[n]) for n in wanted)
    for micro, (now, average) in enumerate(after):
        if micro % 2:  # the second of each step
            wanted = {n: now[n] if n in buffers else x.lerp(now[n], 1 - 0.9) for n, x in wanted.items()}
        assert all(torch.equal(average[n], wanted[n]) for n in wanted), micro


@pytest.mark.parametrize("name", ["contrast", "words"])
def test_soft_labels_are_a_mixed_target(name: str) -> None:
    """(1 - alpha) of the label and alpha of the teacher's softmax as one target has the same gradient."""
    b, alpha = pictures(), 0.4
    student: Any = multitask("contrast", "words", mix={name: 1 - alpha}).double()
    teacher = copy.deepcopy(student)
    for p in teacher.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=F64, generator=torch.Generator().manual_seed(5))
    student.distill = Distill(TeacherAverage(), [SoftLabels([name], weight=alpha)])
    student.distill._network = [teacher]
    student.objective_of(b).total.backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    own, taught = student.label_logits(b)[name](), teacher.label_logits(b)[name]()
    (s_NK, t_NK), sample = (d.logits(torch.arange(len(d.sample_N))) for d in (own, taught)), own.sample_N.tolist()
    hidden_BT = student.objectives["words"].hides(b).loss["text"]
    label = sample if name == "contrast" else b.inputs["text"][hidden_BT].tolist()
    total = sum(t.value.mean() for other, t in student(b).terms.items() if other != name)
    for n, i in enumerate(sample):
        label_K = F.one_hot(torch.tensor(label[n]), s_NK.shape[1]).double()
        target_K = alpha * t_NK[n].detach().softmax(dim=0) + (1 - alpha) * label_K
        total = total - (target_K * s_NK[n].log_softmax(dim=0)).sum() / sample.count(i) / 8
    total.backward()
    for n, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[n], p.grad, **rounding(4096, F64))


def test_refusals() -> None:
    latents = UniversalLayers(16, 1, 2, latents=2, output="latents")
    every: Any = [
        (lambda: UniversalLayers(8, latents=0), "latents 0"),
        (lambda: UniversalLayers(4, heads=2).build({"text": 8}), "tower text has the width 8, and these layers 4"),
        (lambda: model(graph={"nam": []}), "graph: 'nam': no such name; did you mean name"),
        (lambda: model(graph={"name": ["fusion"]}), "objectives: name: graph: it fuses nothing"),
        (lambda: multitask("words", graph={"words": []}), "words: graph: it fuses modalities: add fusion"),
        (lambda: model(universal=None, graph={"name": ["universal"]}), "give model.universal: UniversalLayers"),
        (lambda: model(graph={"name": []}), "one embedding a modality"),
        (lambda: multitask("patches", universal=latents), "hides tokens of image, which latents replace"),
        (lambda: SoftLabels([]), "none; such as"),
        (lambda: SoftLabels(["no"]).build(model(), model()), "'no': no such name"),
    ]
    for make, line in every:
        with pytest.raises(ValueError, match=line):
            make()
