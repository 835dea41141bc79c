"""Every part that ships, made and used once on a few tiny tensors: on the CPU, and on the device under test.

A part is made on the CPU with a fixed seed; ``at(...)`` moves it, and what it is given, to where it is tried. What it
returns is compared between the two, and so are the gradients of the modules that ``at`` moved.
Letters: B samples, T tokens, D width, C classes, K terms, N rows, M modalities.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from timm.optim import Lion
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from descant.callbacks.evaluate.embeddings import Store
from descant.callbacks.evaluate.forward import Mean
from descant.modules import moe
from descant.modules.adaptation.freeze import Freeze
from descant.modules.adaptation.grow import Grow
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.merging import Interpolate, MergeRule, Permuted, Slerp, TaskArithmetic
from descant.modules.adaptation.stage_changes import Boundary, Rewind, TaskMerge
from descant.modules.adaptation.upcycle import Distribute, Upcycle
from descant.modules.adaptation.visual_experts import CopyToVisualExperts
from descant.modules.balance import mcr as games
from descant.modules.balance.agm import AGM
from descant.modules.balance.alignment import LatentAlignment, LogitAlignment
from descant.modules.balance.base import Pacing
from descant.modules.balance.crmt import UnimodalMargin
from descant.modules.balance.ogm import OGM
from descant.modules.balance.random_pacing import RandomPacing
from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.batch import Batch
from descant.modules.core.batch_norm import FrozenBatchNormStats
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.loss_reduction import Step
from descant.modules.core.objective import Term
from descant.modules.core.output import FusionInputs
from descant.modules.core.rows import RunningRows
from descant.modules.core.sham import Sham
from descant.modules.distill import ranking
from descant.modules.distill.distill import FeatureTarget, HardTarget, SoftTarget, in_common
from descant.modules.evaluation import attacks as attack
from descant.modules.evaluation import metrics
from descant.modules.evaluation.items import ItemStore, mean_of, per_group
from descant.modules.evaluation.numbers import number_errors
from descant.modules.evaluation.out_of_distribution import Mahalanobis, NearestNeighbours, auroc_shares
from descant.modules.evaluation.readout import ModelContrast, Products, RidgeReadout
from descant.modules.evaluation.shares import share_rows
from descant.modules.fusion.boosted import BoostedSum
from descant.modules.fusion.classifiers import (
    AttentionFusion,
    FusionHead,
    LateFusion,
    MidFusion,
    OrthogonalFusion,
    SharedHead,
    SoftVoting,
)
from descant.modules.fusion.cross_encoder import CrossEncoder
from descant.modules.fusion.mmcosine import MMCosine
from descant.modules.fusion.mmtm import MMTMFusion
from descant.modules.language.answer_scores import Answers, EditDistanceScorer, ExactMatchScorer
from descant.modules.language.axis_rope import AxisRoPE, InterleavedAxisRoPE, axis_positions, grid_offsets
from descant.modules.language.constrained import BlockSampling
from descant.modules.language.depths import DepthRouting, MixtureOfDepths, depth_terms
from descant.modules.language.generate import Sampling, generate
from descant.modules.language.model import CausalLM
from descant.modules.language.projectors import EachToken, PooledGrid, Resampler
from descant.modules.losses.contrastive import InfoNCE, SigLIP
from descant.modules.losses.exchange import Chunks, Ring
from descant.modules.losses.hinge import HardestInBatchHinge, PairMarginLoss
from descant.modules.losses.numbers import AbsoluteError, GaussianLikelihood, Huber, NumberScale, SquaredError
from descant.modules.losses.ring import RingSigLIP
from descant.modules.losses.views import (
    BYOL,
    DINO,
    NNCLR,
    BarlowTwinsViews,
    MoCoV3,
    ReSSL,
    SimCLR,
    SwAV,
    VICReg,
    ViewObjective,
    Views,
)
from descant.modules.masking import adapters, decoders, discrete_adapters, reductions, sampler, structured
from descant.modules.masking import corruptions as masking
from descant.modules.masking.alignment import Alignment
from descant.modules.masking.any_to_any import AnyToAnyDecoder
from descant.modules.masking.budget import TokenBudget
from descant.modules.masking.code_adapter import CodeAdapter
from descant.modules.masking.conv_adapter import ConvAdapter
from descant.modules.masking.kmeans import KMeansPatches, VectorTokens
from descant.modules.masking.one_of import OneOf
from descant.modules.masking.sequence_adapter import SequenceAdapter
from descant.modules.masking.two_budgets import DirichletPair, TwoBudgets
from descant.modules.missing_modalities import available_sets, modulation, modulation_forms
from descant.modules.missing_modalities.imputation import MeanImputer, PromptImputer, ZeroImputer
from descant.modules.multitask import DWA, STCH, MMPareto, Rule
from descant.modules.multitask.auxiliary_target import AuxiliaryTarget
from descant.modules.objectives.curriculum import Curriculum
from descant.modules.objectives.hard_negatives import Negatives
from descant.modules.objectives.intra import Intra
from descant.modules.policy import advantages
from descant.modules.policy import losses as policy
from descant.modules.policy.preference import DPOLoss
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.modules.tokenizers.unified import CodeFormat, UnifiedVocabulary
from descant.modules.tokenizers.values import PaletteTokens, ScalarTokens
from descant.modules.towers import (
    AnySizeTower,
    BagTower,
    ConvTower,
    LogMelTower,
    PatchEmbed,
    PatchTower,
    SeriesTower,
    TableTower,
    TextTower,
    Tokens,
    Towers,
    VectorTower,
    VideoTower,
    heads,
)
from descant.modules.towers.base import Frozen, Tower
from descant.modules.towers.cached import Cached
from descant.modules.towers.triples import TripleEncoder
from descant.modules.towers.vit import Layout, RaggedBlock, Trunk
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.muon import ConvMuon
from descant.modules.training_setup.optim import Member, OptimizerGroup, parameter_groups
from descant.modules.training_setup.parameter_rules import HiddenMatrices
from descant.modules.training_setup.schedule import TorchSchedule, WarmupCosine
from descant.modules.transforms.any_size import CanvasPixels
from descant.modules.transforms.audio import AudioAugment, LogMel
from descant.modules.transforms.crops import LocalCrops
from descant.modules.transforms.image import Augment, Crop, Pixels
from descant.modules.transforms.palette import dominant_colours
from descant.modules.transforms.regions import Regions
from descant.modules.transforms.series import SeriesAugment
from descant.recipes import Contrastive, Fusion
from tests._suites.discovery import concrete


class Place:
    """Where a part is tried: calling it moves tensors, batches, modules and containers of them there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.modules: list[nn.Module] = []

    def __call__(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            self.modules.append(value.to(self.device))
            return value
        if isinstance(value, Batch):
            return replace(value, **{f.name: self(getattr(value, f.name)) for f in fields(value)})
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, value)

    def grads(self) -> dict[str, Tensor]:
        """Gradients of what was moved, by number of the module and name."""
        named = {f"{n}.{name}": p for n, m in enumerate(self.modules) for name, p in m.named_parameters()}
        return {name: p.grad for name, p in named.items() if p.grad is not None}


Part = Callable[[Place], Any]
#: Name of a class or function -> what it does once.
PARTS: dict[str, Part] = {}


def part(*names: str) -> Callable[[Part], Part]:
    """What is tried is told by these names of classes or functions."""

    def keep(function: Part) -> Part:
        for name in names:
            assert name not in PARTS, f"{name}: tried twice"
            PARTS[name] = function
        return function

    return keep


B, D, C = 6, 8, 4
HAS = {"image": [1, 1, 1, 0, 1, 0], "text": [1, 0, 1, 1, 1, 0]}


def present() -> dict[str, Tensor]:
    return {m: torch.tensor(row).bool() for m, row in HAS.items()}


def unit(rows: int = B, width: int = D) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=1)


def a_batch() -> Batch:
    """Six samples, some without one of the two modalities, one with nothing."""
    inputs = {"image": torch.randn(B, 3, 16, 16), "text": torch.randint(1, 20, (B, 5))}
    targets = {"kind": torch.tensor([0, 1, 2, 3, -1, 0])}
    return Batch(inputs, present(), targets, rng_seed=torch.arange(B) * 7 + 3)


def small_towers() -> Towers:
    return Towers(image=ConvTower([D], stem=4), text=BagTower(20, D))


@part("RunningRows")
def _(at: Place) -> Any:
    net, x_BD = at(nn.Linear(D, C)), at(torch.randn(B, D))
    rows = RunningRows(at(present()["image"]), x_BD.device)
    with rows.running(net):
        return rows.put(net(rows.take(x_BD)))


# between stages -----------------------------------------------------------------------------------------------------


def _merge(rule: MergeRule) -> Part:
    def use(at: Place) -> Any:
        net = at(nn.Linear(D, C))
        then = {name: x + 1 for name, x in net.named_parameters()}
        boundary = Boundary("a", {"before": {n: x.detach() for n, x in then.items()}, "first": then}, 0)
        TaskMerge(rule).apply(net, boundary)
        merged = [p.detach().clone() for p in net.parameters()]
        Rewind().apply(net, boundary)
        return merged, list(net.parameters())

    return use


part("Interpolate", "TaskMerge", "Rewind", "Boundary", "Weights")(_merge(Interpolate(0.3)))
part("Slerp")(_merge(Slerp(0.3)))
part("TaskArithmetic")(_merge(TaskArithmetic(0.5)))
part("Permuted")(_merge(Permuted(Interpolate(0.3))))


# losses of pairs ----------------------------------------------------------------------------------------------------


def _pairs(make: Callable[[], nn.Module]) -> Part:
    def use(at: Place) -> Any:
        loss, (a, b) = at(make()), (at(unit()).requires_grad_() for _ in range(2))
        valid_B = at(present()["image"])
        value_B = loss(a, b, at(torch.arange(B) // 2), valid_B)
        return torch.where(valid_B, value_B, 0.0), a, b

    return use


part("RingSigLIP")(_pairs(lambda: RingSigLIP(rows=4)))
part("Chunks")(_pairs(lambda: SigLIP(exchange=Chunks(rows=4))))
part("Ring")(_pairs(lambda: InfoNCE(exchange=Ring(rows=4))))
part("HardestInBatchHinge")(_pairs(lambda: HardestInBatchHinge(warmup=1)))
for _name, _kind in concrete("ContrastiveLoss").items():
    if _name not in PARTS:
        part(_name)(_pairs(_kind))


@part("PairMarginLoss", "Negatives")
def _negatives(at: Place) -> Any:
    a, b, wrong = (at(unit()) for _ in range(3))
    everyone = at(torch.ones(B, dtype=torch.bool))
    sham = at(Negatives(sham="permute"))
    return PairMarginLoss()(a, b, wrong), sham.values(a, b, wrong, at(torch.arange(B)), everyone)


@part("Intra")
def _intra(at: Place) -> Any:
    intra = at(Intra(width=D, out=4, hidden=8, sham="permute"))
    return intra.values(at(unit()), at(unit()), at(torch.arange(B)), at(torch.arange(B)), at(present()["image"]))


def _of_views(make: Callable[[], ViewObjective]) -> Part:
    """One step, and the queue after it."""

    def use(at: Place) -> Any:
        objective, valid_B = at(make().build(D).train()), at(present()["image"])
        target = [at(unit(width=C)), at(unit(width=C))] if objective.momentum is not None else []
        h = [at(unit()).requires_grad_() for _ in range(2)]
        value = objective(Views(h, at(torch.arange(B)), valid_B, target))
        queue = [] if objective.queue is None else [objective.queue.rows_KP, objective.queue.valid_K]
        return value if objective.whole else torch.where(valid_B, value, 0.0), h, queue

    return use


part("SimCLR", "Views", "MLPHead")(_of_views(lambda: SimCLR(8, C)))
part("BYOL")(_of_views(lambda: BYOL(8, C)))
part("VICReg")(_of_views(lambda: VICReg(8, C)))
part("BarlowTwinsViews")(_of_views(lambda: BarlowTwinsViews(8, C)))
part("DINO", "DINOHead")(_of_views(lambda: DINO(8, C, prototypes=C)))
part("MoCoV3")(_of_views(lambda: MoCoV3(8, C)))
part("SwAV", "Queue")(_of_views(lambda: SwAV(8, C, prototypes=C, queue=B)))
part("NNCLR")(_of_views(lambda: NNCLR(8, C, 8, queue=B)))
part("ReSSL")(_of_views(lambda: ReSSL(8, C, queue=B)))


@part("LocalCrops")
def _crops(at: Place) -> Any:
    return LocalCrops(number=2, size=4)([at(torch.randn(B, 3, 16, 16)).requires_grad_()], at(torch.arange(B)))


# towers, pools, projectors ------------------------------------------------------------------------------------------

IMAGE, WORDS = (3, 3, 16, 16), (3, 5)


def _tower(make: Callable[[], Tower], draw: Callable[[], Tensor]) -> Part:
    def use(at: Place) -> Any:
        tower = at(make())
        return tuple(tower.train()(at(draw())))

    return use


def words() -> Tensor:
    ids = torch.randint(1, 20, WORDS)
    ids[0, 3:] = 0
    return ids


def of_sizes() -> Tensor:
    x_BCHW = torch.randn(3, 3, 16, 24)
    x_BCHW[0, :, 8:] = -torch.inf
    x_BCHW[1, :, :, 8:] = -torch.inf
    return x_BCHW


def sound() -> Tensor:
    x_BFT = torch.randn(3, 8, 12) * 20 - 50
    x_BFT[0, :, 9:] = -torch.inf
    return x_BFT


def series() -> Tensor:
    x_BWT = torch.randn(3, 2, 10)
    x_BWT[0, :, 6:] = torch.nan
    return x_BWT


part("ConvTower", "Residual")(_tower(lambda: ConvTower([8, 8], stem=2), lambda: torch.randn(IMAGE)))
part("PatchTower")(_tower(lambda: PatchTower(16, 8, 8, 1, 2), lambda: torch.randn(IMAGE)))
part("AnySizeTower")(_tower(lambda: AnySizeTower(16, 8, 8, 1, 2), of_sizes))
part("PatchEmbed")(_tower(lambda: PatchEmbed(16, 8, 8), lambda: torch.randn(IMAGE)))
part("VideoTower", "DividedBlock", "TimeAttention")(
    _tower(lambda: VideoTower(16, 8, 4, 8, 1, 2), lambda: torch.randn(3, 3, 3, 16, 16))
)
part("TextTower", "Block")(_tower(lambda: TextTower(20, 8, 1, 2, 5), words))
part("BagTower")(_tower(lambda: BagTower(20, 8), words))
part("TableTower")(_tower(lambda: TableTower([0, 3], 8, 1, 2), lambda: torch.tensor([[0.5, 2.0], [torch.nan, 1.0]])))
part("VectorTower")(_tower(lambda: VectorTower(6, 8), lambda: torch.randn(3, 6)))
part("SeriesTower")(_tower(lambda: SeriesTower(2, 4, 8, 1, 2, mix="none", scale=True), series))
part("LogMelTower", "ConvBlock")(_tower(lambda: LogMelTower(mels=8, width=8, depth=1, kernel=3), sound))
part("Frozen")(_tower(lambda: Frozen(ConvTower([8], stem=4)), lambda: torch.randn(IMAGE)))
part("Trunk")(_tower(lambda: Trunk(width=8, depth=1, heads=2), lambda: torch.randn(3, 5, 8)))


@part("Cached")
def _cached(at: Place) -> Any:
    tower = at(Cached(PatchTower(16, 8, 8, 1, 2), pool=heads.MeanPool(), capacity=8, rows=4))
    x = at(torch.randn(IMAGE))
    return tuple(tower(x)), tuple(tower(x.flip(0)))


@part("Layout", "RaggedBlock")
def _ragged(at: Place) -> Any:
    layout = Layout([at(torch.tensor([2, 0, 3])), at(torch.tensor([1, 1, 1]))])
    block, h_ND = at(RaggedBlock(8, 2)), at(torch.randn(8, 8))
    return block(h_ND, layout), layout.part(h_ND)


def tokens(at: Place, width: int = D, T: int = 4) -> Tokens:
    mask_BT = torch.arange(T) < torch.tensor([T, 2, 1, T, 3, 0])[:, None]
    return Tokens(at(torch.randn(B, T, width)).requires_grad_(), at(mask_BT))


def _pool(make: Callable[[], nn.Module]) -> Part:
    def use(at: Place) -> Any:
        return at(make())(tokens(at))

    return use


part("MeanPool", "Pools")(_pool(lambda: heads.Pools().of("image")))
part("FirstPool")(_pool(heads.FirstPool))
part("LastPool")(_pool(heads.LastPool))
part("MaxPool")(_pool(lambda: heads.MaxPool(D)))
part("MAPPool")(_pool(lambda: heads.MAPPool(D, 2)))
part("AttentionPool")(_pool(lambda: heads.AttentionPool(D, 2)))
part("FlattenPool")(_pool(lambda: heads.FlattenPool(4, D)))
part("EachToken")(_pool(lambda: EachToken().build(D, 4)))
part("Resampler")(_pool(lambda: Resampler(2, 2).build(D, 4)))


@part("PooledGrid")
def _grid(at: Place) -> Any:
    tokens = Tokens(at(torch.randn(B, 4, D)), at(torch.ones(B, 4, dtype=torch.bool)))  # a square has no padding
    return at(PooledGrid(2).build(D, 4))(tokens)


@part("Projection")
def _projection(at: Place) -> Any:
    return at(heads.Projection(D, 4, layers=2))(at(unit()))


@part("CrossEncoder")
def _cross(at: Place) -> Any:
    cross = at(CrossEncoder(width=8, depth=1, heads=2).build(D, 6))
    return cross(tokens(at), tokens(at, 6, 3), at(torch.tensor([0, 1, 2])), at(torch.tensor([2, 1, 0])))


@part("TripleEncoder")
def _triples(at: Place) -> Any:
    x_BK3W = torch.randint(1, 20, (B, 2, 3, 2))
    x_BK3W[0] = 0
    return at(TripleEncoder(20, D, 8, 1, 2))(at(unit()), at(x_BK3W))


# fusion, fills, games -----------------------------------------------------------------------------------------------


def latents() -> dict[str, Tensor]:
    return {m: torch.randn(B, D) for m in HAS}


def _fuse(make: Callable[[], FusionHead]) -> Part:
    def use(at: Place) -> Any:
        fusion, z, here = at(make().build(dict.fromkeys(HAS, D), C)), at(latents()), at(present())
        return fusion(z, here), fusion.parts(z, here)

    return use


part("LateFusion")(_fuse(LateFusion))
part("OrthogonalFusion")(_fuse(OrthogonalFusion))
part("SharedHead")(_fuse(SharedHead))
part("MMCosine")(_fuse(MMCosine))
part("MMTMFusion")(_fuse(MMTMFusion))
part("BoostedSum")(_fuse(lambda: BoostedSum(hidden=8)))
part("MidFusion")(_fuse(lambda: MidFusion(hidden=8)))
part("AttentionFusion")(_fuse(lambda: AttentionFusion(width=8, heads=2)))
part("SoftVoting")(_fuse(lambda: SoftVoting({m: LateFusion().build({m: D}, C) for m in HAS})))

SETS = [["image"], ["text"]]


def _fill(make: Callable[[], Any]) -> Part:
    def use(at: Place) -> Any:
        fill, has = (
            at(make().build(dict.fromkeys(HAS, D), SETS)),
            at({m: torch.tensor([1, m == "image"]).bool() for m in HAS}),
        )
        return fill(at(torch.randn(2, D)), "text", has, ~has["text"])

    return use


part("ZeroImputer")(_fill(ZeroImputer))
part("MeanImputer")(_fill(MeanImputer))
part("PromptImputer")(_fill(PromptImputer))


def _regularizer(make: Callable[[], Regularizer]) -> Part:
    def use(at: Place) -> Any:
        widths = dict.fromkeys(HAS, D)
        fusion = at(OrthogonalFusion().build(widths, C))
        regularizer = at(make().build(widths, C))
        z, batch = {m: z_BD.requires_grad_() for m, z_BD in at(latents()).items()}, at(a_batch())
        logits_BC = fusion(z, batch.present)
        decided = FusionInputs(z, batch.present, batch.targets["kind"])
        asked = FusionContext(decided, batch.present, logits_BC, fusion, fusion, batch, at(torch.tensor(5)))
        return {name: (term.sum(), term.valid) for name, term in regularizer(asked).items()}

    return use


part("FusionContext", "GreedyGame")(_regularizer(lambda: games.GreedyGame(permutations=2)))
part("IndependentGame")(_regularizer(lambda: games.IndependentGame(permutations=2)))
part("CollaborativeGame")(_regularizer(lambda: games.CollaborativeGame(permutations=2)))
part("LabelContrast")(_regularizer(games.LabelContrast))
part("CrossModalSupCon")(_regularizer(games.CrossModalSupCon))
part("Bottleneck")(_regularizer(lambda: games.Bottleneck(hidden=8)))
part("UnimodalMargin")(_regularizer(UnimodalMargin))
part("LogitAlignment")(_regularizer(LogitAlignment))
part("LatentAlignment")(_regularizer(LatentAlignment))
part("AuxiliaryTarget")(_regularizer(lambda: AuxiliaryTarget("kind", C)))


# harmony and balance: what is remembered comes back from a checkpoint, which is read to the CPU -----------------------


def _rule(make: Callable[[], Rule], terms: int = 3) -> Part:
    def use(at: Place) -> Any:
        rule, found = make(), []
        rows = 4 if rule.per_sample else 1
        for step in range(4 if rule.remembers else 1):
            g_BKD = torch.randn(rows, terms, 5, dtype=torch.float64)
            if rows > 1:
                g_BKD[0, 0] = 0
            value_K, at_KD = at(torch.rand(terms) + 0.5), at(g_BKD[0])
            gramian_BKK = at(g_BKD @ g_BKD.mT)
            if (scaled := rule.precondition([at_KD]))[0] is not at_KD:
                gramian_BKK = (scaled[0] @ scaled[0].mT)[None]
            found.append(rule.weights(gramian_BKK, value_K, step))
            rule.learn(lambda seen: seen)
            saved = {name: value.cpu() for name, value in rule.state_dict().items()}
            rule = make()
            rule.load_state_dict(saved)
        return found

    return use


def _combined(make: Callable[[], Rule]) -> Part:
    return lambda at: make().combine(at(torch.randn(3, B, 5)), 7)


part("DWA")(_rule(lambda: DWA(window=1)))
part("STCH")(_rule(lambda: STCH(warmup=1, window=1)))
part("MMPareto")(_rule(MMPareto, terms=2))
for _name, _kind in concrete("Rule").items():
    if _name not in PARTS:
        part(_name)((_combined if _kind.whole_gradients else _rule)(_kind))


def _pacing(make: Callable[[], Pacing]) -> Part:
    def use(at: Place) -> Any:
        pace, found = make(), []
        for _ in range(3):
            score_B = pace.score(at(torch.randn(B, C)), at(torch.randint(C, (B,))))
            found += [score_B, pace.pace(at(torch.rand(2)))]
            saved = {name: value.cpu() for name, value in pace.state_dict().items()}
            pace = make()
            pace.load_state_dict(saved)
        return found

    return use


part("OGM")(_pacing(OGM))
part("AGM")(_pacing(AGM))
part("RandomPacing")(_pacing(RandomPacing))


@part("Curriculum")
def _curriculum(at: Place) -> Any:
    curriculum, batch = Curriculum(sham="permute"), at(a_batch())
    cos_B = curriculum.deciding_cosines(at(torch.linspace(-1, 1, B)), batch.present["image"], batch)
    return cos_B, curriculum.select_samples(cos_B, batch.present["image"], batch, 0.5)


@part("Sham")
def _sham(at: Place) -> Any:
    sham, x_B, draw_B = Sham("permute"), at(torch.arange(6.0)), at(torch.arange(6))
    return (
        sham(x_B, draw_B, at(present()["text"])),
        sham.handed_on(x_B),
        sham.everywhere(x_B, draw_B),
        sham.permute_modalities(at(a_batch()), ["text"]).inputs,
    )


# masked modelling ---------------------------------------------------------------------------------------------------

GRIDS: dict[str, masking.Grid] = {"image": (4, 4), "text": (6,)}


def _corruption(make: Callable[[], masking.Corruption], grids: Mapping[str, masking.Grid] = GRIDS) -> Part:
    def use(at: Place) -> Any:
        real = {m: present()["image"][:, None].expand(B, torch.Size(grid).numel()) for m, grid in grids.items()}
        masks = make()(at(real), dict(grids), at(torch.arange(B)))
        return masks.visible, masks.target, masks.loss

    return use


part("Masks", "UniformMask")(_corruption(lambda: masking.UniformMask(0.5, joint=True)))
part("TokenBudget")(_corruption(lambda: TokenBudget(6, subset_first=True, targets=4)))
part("TwoBudgets", "DirichletPair")(
    _corruption(
        lambda: TwoBudgets(8, 8, [DirichletPair({"image": 0.5, "text": 2.0}, {"text": 1.0})], ["text"], refill=True)
    )
)
part("BlockMask")(_corruption(lambda: structured.BlockMask(0.5), {"image": (4, 4)}))
part("TubeMask")(_corruption(lambda: structured.TubeMask(0.5), {"video": (2, 2, 2)}))
part("SegmentMask")(_corruption(lambda: structured.SegmentMask(anchors=0.3), {"text": (6,)}))
part("SpanMask")(_corruption(lambda: structured.SpanMask(0.5), {"text": (6,)}))
part("Hide")(_corruption(lambda: masking.Hide(["image"])))
part("From")(_corruption(lambda: masking.From(["image"], ["text"])))
part("OneOf")(_corruption(lambda: OneOf([masking.Hide(["image"]), masking.From(["image"], ["text"])])))


@part("Alignment")
def _alignment(at: Place) -> Any:
    align = at(Alignment("image", "text", BagTower(20, 4), width=4).build(("image", "text"), D))
    seen = decoders.At.of(at(torch.ones(B, 3, dtype=torch.bool)))
    encoded = decoders.Encoded({"image": at(torch.randn(len(seen.row_N), D))}, {"image": seen}, at(torch.randn(B, D)))
    return align(encoded, at(a_batch()))["align/image-text"].sum()


@part("Regions")
def _regions(at: Place) -> Any:
    cut = Regions(grid=2, crops=2, side=2, words=3, temperature=1.0)
    x_B3HW, box_BT4 = at(torch.randn(B, 3, 8, 8)), at(cut.boxes(torch.arange(B)))
    feature_BTP = cut.features(x_B3HW, box_BT4)
    return feature_BTP, cut.probabilities(feature_BTP, at(torch.randn(3, 12)))


def _adapter(make: Callable[[], adapters.Adapter], draw: Callable[[], Tensor]) -> Part:
    def use(at: Place) -> Any:
        adapter = make()
        adapter.build(8, 6)
        at(adapter)
        x_BTP, real_BT = adapter.raw(at(draw()))
        place_N = at(torch.arange(adapter.tokens))
        h_NE = at(torch.randn(adapter.tokens, 6))
        losses = adapter.losses(h_NE, x_BTP[0], place_N)
        return real_BT, adapter.embed(x_BTP[0], place_N), losses, adapter.predict(h_NE, place_N), adapter.input(x_BTP)

    return use


def _fitted_to(tokenizer: CodeTokenizer) -> CodeTokenizer:
    tokenizer.fit(torch.randn(9, 6))
    return tokenizer


def _fitted() -> KMeansPatches:
    tokenizer = KMeansPatches(size=[4, 4], patch=2, codes=3, layers=2)
    tokenizer.fit(torch.randn(5, 3, 4, 4))
    return tokenizer


part("PatchAdapter", "MSE", "L1", "Adapters")(
    _adapter(
        lambda: adapters.Adapters(
            image=adapters.PatchAdapter([8, 8], 4, losses=[adapters.MSE(norm=True), adapters.L1()], padded=True)
        ).each()["image"],
        lambda: torch.randn(2, 3, 8, 8),
    )
)
part("CategoryAdapter")(
    _adapter(lambda: discrete_adapters.CategoryAdapter(5, [8, 8], 4), lambda: torch.randint(-1, 5, (2, 8, 8)))
)
part("TokenAdapter")(
    _adapter(lambda: discrete_adapters.TokenAdapter(9, 4, pad=None), lambda: torch.tensor([[3, 4, 5, 6], [3, 0, 0, 0]]))
)
part("SequenceAdapter")(_adapter(lambda: SequenceAdapter(9, 4), lambda: torch.tensor([[3, 4, 5, 6], [3, 0, 0, 0]])))
part("CodeAdapter", "KMeansPatches")(_adapter(lambda: CodeAdapter(_fitted()), lambda: torch.randn(2, 3, 4, 4)))
part("VectorTokens")(_adapter(lambda: CodeAdapter(_fitted_to(VectorTokens(6, 2, 3))), lambda: torch.randn(2, 6)))
part("ScalarTokens")(
    _adapter(
        lambda: CodeAdapter(_fitted_to(ScalarTokens([0] * 6, bins=4))),
        lambda: torch.randn(2, 6).masked_fill(torch.arange(12).view(2, 6) == 3, torch.nan),
    )
)
part("PaletteTokens")(
    _adapter(lambda: CodeAdapter(PaletteTokens(2, 4)), lambda: dominant_colours(torch.rand(2, 3, 4, 4) * 2 - 1, 2))
)
part("TableAdapter")(
    _adapter(lambda: discrete_adapters.TableAdapter([0, 3]), lambda: torch.tensor([[0.5, 2.0], [0.1, torch.nan]]))
)


@part("ConvAdapter")
def _conv_adapter(at: Place) -> Any:
    adapter = ConvAdapter(ConvTower(widths=[8, 8], stem=2, norm="group"), size=[8, 8], patch=4)
    adapter.build(8, 0)
    at(adapter)
    x_BTP, real_BT = adapter.raw(at(torch.randn(B, 3, 8, 8)))
    return real_BT, adapter.visible(x_BTP, decoders.At.of(at(torch.rand(B, 4) < 0.5)))


def _decoder(make: Callable[[], decoders.Decoder]) -> Part:
    def use(at: Place) -> Any:
        grids: dict[str, masking.Grid] = {"image": (2, 2), "text": (3,)}
        decoder = make()
        decoder.build(grids, 8)
        at(decoder)
        seen = {m: torch.rand(B, torch.Size(g).numel()) < 0.5 for m, g in grids.items()}
        where = {m: decoders.At.of(at(mask_BT)) for m, mask_BT in seen.items()}
        h = {m: at(torch.randn(int(mask_BT.sum()), 8)) for m, mask_BT in seen.items()}
        encoded = decoders.Encoded(h, where, at(torch.randn(B, 8)))
        asked = {m: decoders.At.of(at(~mask_BT)) for m, mask_BT in seen.items()}
        return decoder(encoded, asked), encoded.pool()

    return use


part("Encoded", "Places", "JointDecoder")(_decoder(lambda: decoders.JointDecoder(8, 1, 2)))
part("CrossDecoder")(_decoder(lambda: decoders.CrossDecoder(8, 1, 2)))
part("AnyToAnyDecoder")(_decoder(lambda: AnyToAnyDecoder(8, 1, 2)))


def _reduction(make: Callable[[], reductions.Reduction]) -> Part:
    def use(at: Place) -> Any:
        count = {m: at(torch.arange(B) * k) for k, m in enumerate(HAS)}
        return list(make()(reductions.TargetCounts(count, dict.fromkeys(HAS, 3), at(a_batch()), 2)).values())

    return use


for _name in ("SumOfModalities", "MeanOfModalities", "MeanOfTokens", "ReleasedModalities", "ReleasedTokens"):
    part(_name)(_reduction(getattr(reductions, _name)))
for _name in ("ConfidentFirst", "RandomFirst"):
    part(_name)(lambda at, name=_name: getattr(sampler, name)().key(at(torch.rand(B, 4)), at(torch.rand(B, 4))))  # type: ignore[misc]


# missing modalities -------------------------------------------------------------------------------------------------


def _bank(form: Callable[[], modulation_forms.Modulation]) -> Part:
    def use(at: Place) -> Any:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.norm(self.conv(x)).mean(dim=(2, 3)))

        net = Net()
        bank = at(modulation.ModulationBank(form()).attach(net, list(HAS)))
        has = at({"image": torch.tensor([1, 1, 0]).bool(), "text": torch.tensor([1, 0, 1]).bool()})
        with bank.route(has):
            return at(net)(at(torch.randn(3, 3, 6, 6)))

    return use


part("ModulationBank", "ScaleShift", "Sets")(_bank(modulation_forms.ScaleShift))
part("LowRank")(_bank(modulation_forms.LowRank))


@part("AvailableSets")
def _available(at: Place) -> Any:
    sets, here = available_sets.AvailableSets(), at(present())
    return sets.remaining_modalities(here, at(torch.arange(B)), list(HAS)), available_sets.AvailableSets(
        per="batch"
    ).remaining_modalities(here, at(torch.arange(B)), list(HAS))


# distillation -------------------------------------------------------------------------------------------------------


def lists(at: Place) -> ranking.Lists:
    return ranking.Lists(at(torch.randn(B, 3)), at(torch.randn(B, 3)).requires_grad_(), at(present()["image"]))


for _name in ("UniformWeighting", "TeacherConfidence", "TeacherUncertainty", "AsReleased", "StudentLag"):
    part(_name)(lambda at, name=_name: getattr(ranking, name)()(lists(at)))  # type: ignore[misc]  # of two parameters
for _name in ("ListKL", "ListMSE", "CentredListMSE"):
    part(_name)(lambda at, name=_name: getattr(ranking, name)()(lists(at)))  # type: ignore[misc]


@part("Lists")
def _lists(at: Place) -> Any:
    return lists(at).entropy()


@part("SoftTarget", "HardTarget")
def _decisions(at: Place) -> Any:
    s, t = at(torch.randn(B, C)).requires_grad_(), at(torch.randn(B, C))
    return (
        SoftTarget(2.0).value(s, t),
        HardTarget().value(s, t),
        in_common(at(torch.tensor([0, 2, 3])), at(torch.tensor([1, 2, 3]))),
    )


@part("RankTarget", "FeatureTarget", "DistillContext", "Distill")
def _lesson(at: Place) -> Any:
    from descant.modules.distill.distill import Distill, Teacher

    class Other(Teacher):
        def network(self, student: nn.Module) -> nn.Module:
            return other

    student, other = Contrastive(small_towers(), width=D), Contrastive(small_towers(), width=4)
    distill = Distill(
        Other(), [ranking.RankTarget(drawn=4, kept=2, weigh=ranking.TeacherConfidence()), FeatureTarget("image")]
    )
    distill.prepare(student)
    at(student), at(other), at(distill)
    batch = at(replace(a_batch(), present={m: torch.ones(B, dtype=torch.bool) for m in HAS}, step={}))
    student.terms(batch)
    return {
        name: (term.value, term.valid, term.weight)
        for name, term in distill(student, batch, student.forward(batch)).items()
    }


# language and reinforcement -----------------------------------------------------------------------------------------


@part("CausalLM", "Layer", "Sampling")
def _language(at: Place) -> Any:
    lm = at(CausalLM(20, 8, 1, 2, length=16))
    h_BTD = lm(lm.embed(at(torch.randint(1, 20, (2, 5)))), at(torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])))
    drawn = [Sampling(0.7, k, p).draw(h_BTD.detach()[:, 0], at(torch.arange(2)), 0) for k, p in ((None, 1.0), (3, 0.8))]
    return h_BTD, drawn


ROUTERS: dict[str, Callable[[], moe.Router]] = {
    "TopKRouter": lambda: moe.TopKRouter(2, bias_rate=0.1),
    "TaskGate": lambda: moe.TaskGate(2),
    "TopPRouter": lambda: moe.TopPRouter(0.6, null_experts=1),
    "ModalityTopK": lambda: moe.ModalityTopK([[0, 1, 2], [1, 2, 3]]),
    "HardModality": lambda: moe.HardModality([3, 0]),
    "StaticSkill": lambda: moe.StaticSkill([[0, 2], [1, 2, 3]]),
    "ExpertChoice": lambda: moe.ExpertChoice([[0, 1], [2, 3]], auxiliary=moe.CausalAux(4)),
}


def _routed(router: Callable[[], moe.Router]) -> Part:
    def use(at: Place) -> Any:
        layer = at(moe.MoELayer(D, 8, 4, router(), shared=1, capacity=moe.Capacity(1.0), form="gelu"))
        n_N = torch.arange(12)
        y_ND, routing = layer(at(torch.randn(12, D)), moe.Marks(at(n_N % 2), at(n_N // 2 % 2), at(n_N % 5 > 0)))
        moe.observe([(layer.router, routing)])
        moe.move_biases(layer)
        return y_ND, routing.weight, routing.causal, [b for _, b in layer.named_buffers()]

    return use


for _name, _router in ROUTERS.items():
    part(
        _name,
        *(
            {
                "ExpertChoice": ["CausalAux"],
                "TopKRouter": ["MoELayer", "GELUExperts", "Capacity", "Segments", "GELU"],
            }.get(_name, [])
        ),
    )(_routed(_router))


@part("ModalityLinear", "VisualExperts", "CopyToVisualExperts")
def _visual(at: Place) -> Any:
    id_BT = torch.tensor([[5, 9, 9, 3, 0], [5, 6, 3, 0, 0]])
    made = []
    for visual in (moe.VisualExperts(attention=True), moe.VisualExperts(sham="permute")):
        recipe = nn.Module()
        recipe.lm = lm = at(CausalLM(20, 8, 1, 2, length=16, visual=visual))
        CopyToVisualExperts().apply(recipe, Boundary("captions", {}, 0))
        ids = at(id_BT)
        kind_BT = visual(at((id_BT == 9).long()), at(id_BT != 0), at(torch.arange(2)))
        h_BTD = lm(lm.embed(ids), at((id_BT != 0).long()), marks=moe.Marks(kind_BT))
        made += [h_BTD, generate(lm.eval(), ids[:1, :4], new=2).log_RN]
    return made


@part("ExpertLayers", "SwiGLUExperts", "RoutedBlock", "DecodeExperts", "SwiGLU")
def _experts(at: Place) -> Any:
    experts, routings = moe.ExpertLayers(4, moe.TopKRouter(), z=0.1, every=2), list[moe.Routing]()
    lm, trunk = at(CausalLM(20, 8, 2, 2, length=16, experts=experts)), at(Trunk(8, 2, 2, experts=experts))
    h_BTD = lm(lm.embed(at(torch.randint(1, 20, (2, 5)))), at(torch.tensor([[1, 1, 2, 2, 0]] * 2)), routings=routings)
    terms = moe.expert_terms(experts, routings)
    made = generate(lm.eval(), at(torch.tensor([[1, 9]])), new=3).log_RN
    h_MD = trunk(at(torch.randn(5, 8)), Layout([at(torch.tensor([1, 1])), at(torch.tensor([2, 3]))])).h_BTD
    return h_BTD, made, h_MD, [term.value for term in terms.values()]


@part("AxisRoPE", "InterleavedAxisRoPE")
def _axes(at: Place) -> Any:
    ids_PT, offset_T3 = torch.tensor([[1, 9, 9, 9, 9]]), grid_offsets(torch.tensor([0]), 2, 2)
    position = axis_positions(F.pad(offset_T3, (0, 0, 1, 0))[None], (ids_PT == 9).long())
    lms = [at(CausalLM(20, 16, 1, 2, length=16, positions=axes)) for axes in (AxisRoPE(), InterleavedAxisRoPE())]
    return [generate(lm, at(ids_PT), new=2, position_PT=at(position)).log_RN for lm in lms]


@part("MixtureOfDepths", "DepthLayer")
def _depths(at: Place) -> Any:
    lm = at(CausalLM(20, 8, 2, 2, length=16, depths=MixtureOfDepths(0.5, auxiliary=moe.CausalAux(4))))
    ids_PT, routings = at(torch.randint(1, 20, (2, 6))), list[moe.Routing]()
    h_BTD = lm(lm.embed(ids_PT), (ids_PT > 4).long(), routings=routings)
    loss = depth_terms([routing for routing in routings if isinstance(routing, DepthRouting)])["depths/causal"].value
    return h_BTD, loss, generate(lm.eval(), ids_PT, new=3).log_RN


@part("BlockSampling", "UnifiedVocabulary", "CodeFormat", "DecodeHead", "DecodeLayer")
def _blocks(at: Place) -> Any:
    vocabulary = UnifiedVocabulary(20, {"image": CodeFormat((2,), 3), "audio": CodeFormat((2,), 2, 2)})
    sampling = BlockSampling(vocabulary=vocabulary, only=("audio", "image"))
    made = generate(
        at(CausalLM(vocabulary.size, 8, 1, 2, length=16)), at(torch.tensor([[1, 9]])), new=7, sampling=sampling
    )
    return vocabulary.wrap("image", at(torch.tensor([[0, 2]]))), made.log_RN


@part("Answers", "ExactMatchScorer", "EditDistanceScorer")
def _judges(at: Place) -> Any:
    answers = Answers(at(a_batch()), at(torch.tensor([[5, 6, 2]])), at(torch.tensor([[5, 7, 0]])), nn.Identity())
    return CPU(ExactMatchScorer()(answers)), CPU(EditDistanceScorer()(answers))


for _name in ("GroupScaled", "BatchScaled", "Centred", "EachScaled"):

    @part(_name)
    def _advantage(at: Place, name: str = _name) -> Any:
        r_BK = torch.rand(B, 2)
        r_BK[1, 0] = torch.nan
        judged = getattr(advantages, name)()(
            at(r_BK), at(torch.tensor([1.0, 0.5])), at(torch.tensor([7, 7, 7, 8, 8, 8]))
        )
        return tuple(judged)


def drawn(at: Place) -> policy.PolicyBatch:
    log_N, old_N, reference_N = (-torch.rand(7) for _ in range(3))
    sample_N = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    valid_B, advantage_B = torch.tensor([True, True, False]), torch.tensor([1.0, -1.0, 0.5])
    moved = (at(x) for x in (old_N, sample_N, advantage_B, valid_B, reference_N))
    return policy.PolicyBatch(at(log_N).requires_grad_(), *moved)


def _policy(**given: Any) -> Part:
    def use(at: Place) -> Any:
        answers, seen = drawn(at), None
        counts = policy.Counts.of(answers.length_B, answers.valid_B)
        terms, seen = policy.PolicyLoss(**copy.deepcopy(given))(answers, counts)
        return {name: term.sum() for name, term in terms.items()}, seen

    return use


part("PolicyLoss", "Clipped", "TokenMean", "TokenRatio", "KL")(
    _policy(surrogate=policy.Clipped(cap=3.0, dual=3.0), aggregation=policy.TokenMean(), kl=policy.KL(0.1))
)
part("CISPO", "SequenceMean")(_policy(surrogate=policy.CISPO(), aggregation=policy.SequenceMean()))
part("AnswerRatio", "SequenceSum")(
    _policy(surrogate=policy.Clipped(ratio=policy.AnswerRatio()), aggregation=policy.SequenceSum(4))
)
part("LocalTokenMean")(_policy(aggregation=policy.LocalTokenMean()))


@part("DPOLoss")
def _dpo(at: Place) -> Any:
    good_B, bad_B, reference_B = (at(-torch.rand(B)) for _ in range(3))
    length_B2 = at(torch.randint(1, 5, (B, 2)))
    return DPOLoss(by_length=True)(good_B.requires_grad_(), bad_B, reference_B, reference_B, length_B2)


# pictures and sounds as input ---------------------------------------------------------------------------------------


@part("CanvasPixels")
def _of_any_size(at: Place) -> Any:
    x_B4HW, draw_B = torch.randint(0, 256, (3, 4, 16, 16), dtype=torch.uint8), torch.arange(3)
    x_B4HW[:, 3] = 255
    x_B4HW[0, 3, 8:] = 0
    return tuple(at(AnySizeTower(16, 8, 8, 1, 2))(CanvasPixels()(at(x_B4HW), at(draw_B))))


@part("Augment", "Crop", "Pixels")
def _pictures(at: Place) -> Any:
    x_BCHW, draw_B = at(torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)), at(torch.arange(3))
    return [make(8)(x_BCHW, draw_B) for make in (Augment, Crop, Pixels)]


@part("SquaredError", "AbsoluteError", "Huber", "GaussianLikelihood", "NumberScale")
def _predicted_numbers(at: Place) -> Any:
    raw_BK, y_B = at(torch.randn(B, 2)), at(torch.tensor([1.0, 2.0, torch.nan, 4.0, 5.0, 6.0]))
    losses = [SquaredError(), AbsoluteError(), Huber(), GaussianLikelihood()]
    scales = [at(NumberScale("y", loss).set(3.0, 2.0)) for loss in losses]
    here_B = at(torch.ones(B, dtype=torch.bool))
    return [scale.term(raw_BK, {"y": y_B}, here_B, "valid").sum() for scale in scales], scales[0].predictions(raw_BK)


@part("number_errors")
def _number_errors(at: Place) -> Any:
    f_N, y_N = at(torch.randn(2, 20))
    errors: Any = number_errors(f_N, y_N, at(torch.arange(20)))
    return [errors["rmse"].float(), errors["r2"].float(), errors["mae"].mean().float()]


@part("SeriesAugment")
def _series_augment(at: Place) -> Any:
    return SeriesAugment(0.1, 0.1, 0.5)(at(torch.ones(3, 2, 40)), at(torch.arange(3)))


@part("LogMel", "AudioAugment")
def _sounds(at: Place) -> Any:
    mel = at(LogMel(mels=20))
    x_BFT = mel(at(torch.randn(2, 8000)), at(torch.tensor([8000, 4000])))
    return x_BFT, at(AudioAugment())(x_BFT, at(torch.arange(2)))


# metrics ------------------------------------------------------------------------------------------------------------


@part(
    *("retrieval_ranks", "recall_by_chance"),
    *("average_precision", "chance_average_precision"),
)
def _retrieval(at: Place) -> Any:
    z_QD, z_GD, key_Q, key_G = (
        at(unit(4)),
        at(unit(6)),
        at(torch.tensor([0, 1, 2, 9])),
        at(torch.tensor([0, 1, 2, 0, 1, 5])),
    )
    ranks = metrics.retrieval_ranks(z_QD, key_Q, z_GD, key_G)
    precision_Q = metrics.average_precision(z_QD, key_Q, z_GD, key_G)
    right_Q = (key_Q[:, None] == key_G).sum(1)
    by_chance = metrics.recall_by_chance(right_Q, len(key_G), k=2)
    return ranks, precision_Q, by_chance, metrics.chance_average_precision(key_Q, key_G)


@part("knn_scores", "fit_logistic", "balanced_accuracy")
def _probes(at: Place) -> Any:
    z_ND, y_N = at(unit(12)), at(torch.arange(12) % 3)
    w_CD, b_C = metrics.fit_logistic(z_ND, y_N, 3, steps=5)
    said_N = (z_ND @ w_CD.T + b_C).argmax(dim=1)
    return metrics.knn_scores(z_ND, z_ND, y_N, 3, k=2, temperature=0.1), w_CD, metrics.balanced_accuracy(said_N, y_N, 3)


@part("Items", "ItemStore")
def _items(at: Place) -> Any:
    value_N, id_N, store = at(torch.rand(5)), at(torch.arange(5) // 2), at(ItemStore())
    store.update(value_N, id_N)
    items = store.items()
    return items.mean(), per_group(value_N, id_N, id_N).mean(), mean_of([items, items]).mean()


@part("swap_hits", "psnr", "ridge_weights")
def _numbers(at: Place) -> Any:
    score_N, wrong_N, x_NP = at(torch.rand(6)), at(torch.rand(6)), torch.randn(9, 3, dtype=torch.float64)
    moments = torch.cat([torch.ones(9, 1, dtype=torch.float64), x_NP], dim=1)
    weights = metrics.ridge_weights(at(moments.T @ moments), 2, 0.1)
    return (
        metrics.swap_hits(score_N, wrong_N),
        metrics.psnr(score_N, at(torch.tensor(2.0))),
        weights,
    )


@part("matched_rows", "modality_gap", "effective_rank", "feature_std", "alignment", "uniformity", "wide")
def _geometry(at: Place) -> Any:
    a, b, here = at(unit()), at(unit()), at(present())
    rows = metrics.matched_rows(here["image"], here["text"], at(torch.tensor([7, 7, 8, 9, 9, 1])))
    numbers = metrics.modality_gap(a, b), metrics.effective_rank(a), metrics.alignment(a, b), metrics.uniformity(a)
    return rows, numbers, metrics.feature_std(a), a.to(metrics.wide(at.device))


@part("Detector", "Mahalanobis", "NearestNeighbours")
def _out_of_distribution(at: Place) -> Any:
    bank, a, b = at(unit()), at(unit()), at(unit())
    rows = share_rows(at(torch.tensor([0, 1, 0, 1, 0, 2])), at(torch.rand(6)), 0.5)
    return rows, [auroc_shares(score(a, bank), score(b, bank)) for score in (Mahalanobis(), NearestNeighbours(2))]


@part("RidgeReadout", "Products", "ModelContrast", "Reading")
def _readouts(at: Place) -> Any:
    x_NP, y_NS = at(torch.randn(40, 3)), at(torch.randn(40, 2))
    read, other = RidgeReadout()(x_NP, y_NS), RidgeReadout()(Products(x_NP, x_NP.flip(1), 2), y_NS)
    contrast = ModelContrast(resamples=8)
    return tuple(read), tuple(other), contrast.p_value(read, other), contrast.resample(read)


@part("Mean")
def _mean(at: Place) -> Any:
    mean = at(Mean())
    mean.update(Term(at(torch.rand(B)), valid=at(present()["image"])))
    return mean.compute()


@part("Store", "Rows")
def _store(at: Place) -> Any:
    store, batch = at(Store()), at(a_batch())
    store.update({m: torch.randn(B, D).to(at.device) for m in HAS}, batch)
    return [x for x in vars(store.compute()).values() if isinstance(x, Tensor)]


# the step, and what changes a model before it -------------------------------------------------------------------------


@part("Step", "Term", "Objective", "Batch", "FusionInputs")
def _step(at: Place) -> Any:
    step, batch, z_BD = Step(mix={"a": 0.5}), at(a_batch()), at(unit()).requires_grad_()
    hooks = GradientHooks(watched=True)
    hooks.rule = lambda g_KBD, names: g_KBD.mean(dim=0)
    both = hooks.fork(z_BD, ["a", "b"])
    terms = {
        "a": Term(both["a"].sum(dim=1), valid=batch.both("image", "text"), given=("image", "text")),
        "b": Term(both["b"].square().sum(dim=1), weight=at(torch.rand(B)), norm="local"),
    }
    objective = step(hooks.watch(terms), batch)
    (g_BD,) = torch.autograd.grad(objective.total, z_BD)
    return objective.total.detach(), g_BD, batch.select(at(torch.tensor([0, 2]))).inputs


@part("Lora", "Freeze", "Checkpointing", "FrozenBatchNormStats", "Towers")
def _adapted(at: Place) -> Any:
    recipe = Contrastive(
        Towers(image=ConvTower([D], stem=4), text=TextTower(20, 8, 1, 2, 5)),
        width=D,
        adapt=[Lora(r=2, towers=["text"], dora=True), Freeze(["image"])],
        checkpointing=Checkpointing(),
    )
    recipe.configure_model()
    at(recipe)
    with FrozenBatchNormStats(recipe):
        return {name: term.value for name, term in recipe.terms(at(a_batch())).items()}


@part("Grow", "Growth")
def _grown(at: Place) -> Any:
    recipe = Contrastive(Towers(image=ConvTower([D], stem=4), text=TextTower(20, 8, 1, 2, 5)), width=D)
    at(recipe)
    average = Grow(depth=1, mlp_ratio=6).grow(recipe, seed=0)["towers.text"](recipe.towers["text"].state_dict())
    values = {name: term.value for name, term in recipe.terms(at(a_batch())).items()}
    return values, average["layers.1.out.weight"]


@part("Upcycle", "Distribute")
def _upcycled(at: Place) -> Any:
    recipe: Any = nn.Module()
    recipe.lm = CausalLM(20, 8, 1, 2)
    at(recipe)
    ids_BT, values = at(torch.tensor([[3, 4, 5]])), []
    for change in (Upcycle(moe.ExpertLayers(2, moe.TopKRouter(2)), noise=0.1), Distribute()):
        recipe = copy.deepcopy(recipe)
        change.apply(recipe)
        values.append(recipe.lm(recipe.lm.embed(ids_BT)))
    return values


def _optimized(make: Callable[[list[dict[str, Any]]], Any]) -> Part:
    def use(at: Place) -> Any:
        net = at(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
        optimizer = make(parameter_groups(net))
        schedule = WarmupCosine(0.5)(optimizer, 4)
        x = at(torch.randn(3, 4))
        for step in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            if step == 1:
                optimizer.load_state_dict(
                    tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, optimizer.state_dict())
                )
        return [p.detach() for p in net.parameters()]

    return use


part("AdamW", "WarmupCosine")(_optimized(lambda groups: torch.optim.AdamW(groups, lr=0.1)))
part("SGD")(_optimized(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)))
part("OptimizerGroup", "Member")(
    _optimized(lambda groups: OptimizerGroup(groups, [Member(torch.optim.SGD, "^0"), Member(torch.optim.AdamW)]))
)


def _muon(groups: Any) -> OptimizerGroup:
    muon = Member(lambda share: ConvMuon(share, sham="normalize"), rule=HiddenMatrices())
    return OptimizerGroup(groups, [muon, Member(torch.optim.AdamW)])


part("ConvMuon", "HiddenMatrices")(_optimized(_muon))
part("Lion")(_optimized(lambda groups: Lion(groups, lr=0.1)))


@part("TorchSchedule")
def _plateau(at: Place) -> Any:
    net = at(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    plateau: Any = TorchSchedule(lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0), monitor="x")(
        optimizer, 4
    )
    for value in (1.0, 2.0):
        plateau.step(at(torch.tensor(value)))
    return [group["lr"] for group in optimizer.param_groups]


@part("Nudge")
def _nudge(at: Place) -> Any:
    recipe = at(Fusion(small_towers(), target="kind", classes=C, width=D, fusion=LateFusion()))
    batch = at(a_batch())
    nudge = attack.Nudge(recipe, batch, list(HAS))
    return nudge(nudge.zero()), nudge.size_B()


class CPU:
    """Of a result: it belongs on the CPU wherever the part is tried."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
