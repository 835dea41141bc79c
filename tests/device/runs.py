"""Small runs that together hold every recipe and every callback that ships: tiny models on tiny data, made in process.

``RUNS[name](before)`` makes one; ``before`` is the folder of the runs that some begin from, see :func:`prepare`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from descant import callbacks as c
from descant.callbacks.evaluate.answering import Answering
from descant.datamodules.combined.stages import StageData, StagedData
from descant.datamodules.corpora.captions import AltText, CaptionMixer, SyntheticCaption
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_table import COLUMNS
from descant.datamodules.corpora.scenes import Scenes
from descant.datamodules.tasks.descriptions import Descriptions
from descant.datamodules.tasks.question_pool import QuestionPool, QuestionRollouts
from descant.datamodules.tasks.questions import QuestionPairs, Questions
from descant.datamodules.tasks.rollout_pairs import RolloutPairs
from descant.modules import moe
from descant.modules.adaptation.inherit import Begin, Extend, Inherit
from descant.modules.adaptation.saved_tower import SavedTower
from descant.modules.adaptation.visual_experts import BeginText
from descant.modules.balance import mcr as games
from descant.modules.balance.agm import AGM
from descant.modules.balance.alignment import LatentAlignment, LogitAlignment
from descant.modules.core.batch import Batch
from descant.modules.distill.distill import Distill, SoftLabels, SoftTarget
from descant.modules.distill.ranking import RankTarget, TeacherConfidence
from descant.modules.evaluation.inversion import ModalityInversion
from descant.modules.evaluation.readout import ModelContrast, RidgeReadout
from descant.modules.fusion.classifiers import LateFusion, MidFusion
from descant.modules.fusion.cross_encoder import CrossEncoder, FusionLayers
from descant.modules.fusion.mmtm import MMTMFusion
from descant.modules.fusion.single_then_two import SingleThenTwo
from descant.modules.fusion.universal import UniversalLayers
from descant.modules.language.answer_scores import LikelihoodScorer
from descant.modules.language.axis_rope import AxisRoPE
from descant.modules.language.model import CausalLM
from descant.modules.language.positions import VisualAxes, VisualSteps
from descant.modules.language.projectors import PooledGrid
from descant.modules.losses import InfoNCE
from descant.modules.losses.information import Boltzmann, Normal
from descant.modules.losses.numbers import GaussianLikelihood
from descant.modules.losses.views import BYOL, DINO
from descant.modules.masking.adapters import Adapter, Adapters, PatchAdapter
from descant.modules.masking.any_to_any import AnyToAnyDecoder
from descant.modules.masking.budget import TokenBudget
from descant.modules.masking.code_adapter import CodeAdapter
from descant.modules.masking.corruptions import UniformMask
from descant.modules.masking.decoders import CrossDecoder
from descant.modules.masking.discrete_adapters import CategoryAdapter, TokenAdapter
from descant.modules.masking.kmeans import KMeansPatches, VectorTokens
from descant.modules.masking.patch_mix import PatchMix
from descant.modules.masking.reductions import MeanOfModalities
from descant.modules.masking.sampler import Sampler
from descant.modules.masking.sequence_adapter import SequenceAdapter
from descant.modules.masking.structured import SegmentMask
from descant.modules.masking.two_budgets import DirichletPair, TwoBudgets
from descant.modules.masking.view_decoder import ViewDecoder
from descant.modules.missing_modalities.imputation import PromptImputer
from descant.modules.missing_modalities.modulation import ModulationBank
from descant.modules.moe import Capacity, ExpertLayers, StaticSkill, TopKRouter, VisualExperts
from descant.modules.multitask import MIMO, GradVac, MMPareto, PCGrad
from descant.modules.objectives.base import TaskObjective
from descant.modules.objectives.classify import Classify
from descant.modules.objectives.columns import MaskedColumns
from descant.modules.objectives.contrast import Contrast
from descant.modules.objectives.curriculum import Curriculum
from descant.modules.objectives.hard_negatives import Negatives
from descant.modules.objectives.intra import Intra
from descant.modules.objectives.masked import MaskedTokens
from descant.modules.objectives.match import Match
from descant.modules.objectives.quantized import QuantizedTokens
from descant.modules.objectives.regions import MaskedRegions
from descant.modules.objectives.regress import Regress
from descant.modules.objectives.two_views import TwoViews
from descant.modules.policy import KL, PolicyLoss
from descant.modules.policy.rewards import ExactAnswer, Rewards
from descant.modules.tokenizers.quantizers import FSQ, VQ
from descant.modules.tokenizers.text import NgramTokenizer
from descant.modules.tokenizers.values import PaletteTokens, ScalarTokens
from descant.modules.towers import BagTower, ConvTower, PatchTower, RegionTower, TableTower, TextTower, Towers
from descant.modules.towers.triples import TripleEncoder
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup.schedule import WarmupCosine
from descant.modules.transforms.crops import LocalCrops
from descant.modules.transforms.regions import Regions
from descant.modules.transforms.table import ColumnMissing
from descant.recipes import (
    DPO,
    GRPO,
    Alternating,
    Certified,
    Contrastive,
    Ensemble,
    Fusion,
    Masked,
    Matching,
    MissingModality,
    MultiTask,
    MutualInformation,
    Peers,
    Recipe,
    ReconBoost,
    Regression,
    SelfSupervised,
    Stage,
    Staged,
    TeacherAverage,
    TeacherRun,
    TeacherStage,
    VisionLanguage,
)
from descant.recipes.base.teachers import Teachers
from tests._suites import OnDevice
from tests._suites.discovery import picked
from tests.recipes.test_certified import Banked
from tests.recipes.test_missing import PatternData, build, fusion, node, write
from tests.recipes.test_staged import letters
from tests.recipes.test_staged import model as staged_model
from tests.small import small_chat

#: Of a language model of questions: pictures, tokens and questions as few as they can be.
ASKED: dict[str, Any] = {"tiny": True, "size": 24, "length": 64, "kinds": ["colour", "count"], "batch_size": 16}
NAMES = ("image", "text")


@dataclass
class Run:
    """What is trained, on what, with which callbacks; options of its trainer, and for how many steps."""

    recipe: Recipe
    data: L.LightningDataModule
    callbacks: list[L.Callback] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 2


RUNS: dict[str, Callable[[Path], Run]] = {}


def run(make: Callable[[Path], Run]) -> Callable[[Path], Run]:
    """A run by the name of its function."""
    RUNS[make.__name__] = make
    return make


def prepare(folder: Path) -> Path:
    """Runs that others begin from: untrained, as they would lie on disk."""
    models = {
        "both": fusion("MidFusion", *NAMES),
        "margins": fusion("OrthogonalFusion", *NAMES),
        **{m: fusion("LateFusion", m) for m in NAMES},
        "clip": node("Contrastive", *NAMES),
        "codes": {"class_path": "descant.recipes.Masked"},
        "texts": {"class_path": "descant.recipes.VisionLanguage"},
    }
    plain: dict[str, Callable[[], Recipe]] = {
        "codes": lambda: Masked(codes(), Trunk(8, 1, 2)),
        "texts": lambda: VisionLanguage(lm=small_chat()["lm"], answer_token=8193),
    }
    for name, model in models.items():
        write(folder / name, model, plain[name]() if name in plain else build(model))
    return folder


def adamw(groups: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=1e-2)


def emoji(**options: Any) -> Emoji:
    return Emoji(**({"batch_size": 16, "eval_batch_size": 32, "size": 16, "tiny": True, "keywords": False} | options))


def pattern_towers(*modalities: str, vocab: int = 20) -> Towers:
    every = {"image": ConvTower([8], stem=2), "text": BagTower(vocab, 8), "sketch": ConvTower([8], channels=1)}
    return Towers(others={m: every[m] for m in modalities or NAMES})


def patterns(**options: Any) -> Fusion:
    given: dict[str, Any] = {"target": "label", "classes": 4, "width": 8, "optimizer": adamw} | options
    return Fusion(given.pop("towers", None) or pattern_towers(), **given)


# embeddings ---------------------------------------------------------------------------------------------------------


@run
def contrastive(before: Path) -> Run:
    towers = Towers(image=PatchTower(16, 8, 8, 1, 2), text=TextTower(8192, 8, 1, 2, 24))
    recipe = Contrastive(towers, 8, loss=InfoNCE(), intra=Intra(8, out=8, hidden=8), optimizer=adamw)
    inverted = ModalityInversion(steps=2, batch=8)
    return Run(
        recipe,
        emoji(views={"image": 2}, name_only=1.0),
        [
            c.EMA(0.9),
            c.Retrieval(),
            c.HeldOutLoss(),
            c.ZeroShot("group"),
            c.KNN("group"),
            c.LinearProbe("group"),
            c.Geometry(),
            c.ModalitySubsetEval("group", limit=32),
            c.RetrievalPictures(queries=2),
            c.Projector(limit=20),
            c.IntraModal(target="subgroup", validate=True),
            c.Inversion("{}", target="subgroup", limit=4, oti=inverted, ovi=inverted, validate=True),
            c.Temperature(at=0.5),
            c.ProgressiveResizing([16], [0.5]),
            c.NonFinite("rollback"),
            c.TrainFlops(),
            c.Throughput(peak_flops=1e9),
            c.Watch(window=2),
            c.Sanity(),
            c.WorstGroup(["i2t_r1"]),
            c.WorstOf(["i2t_r1", "t2i_r1"]),
            c.Accumulation(["i2t_r1"]),
            ModelCheckpoint(filename="{step}"),
        ],
        {"precision": "bf16-mixed", "val_check_interval": 2},
    )


@run
def mixed_captions(before: Path) -> Run:
    mixer = CaptionMixer({"alt": AltText(), "looks": SyntheticCaption("dense")}, {"alt": 0.3, "looks": 0.7})
    recipe = Contrastive(Towers(image=ConvTower([8], stem=4), text=BagTower(512, 8)), 8, optimizer=adamw)
    readout = c.Readout(["visual"], ridge=RidgeReadout(folds=2), contrast=ModelContrast(resamples=8))
    data = emoji(text=NgramTokenizer(buckets=512, length=24), mixer=mixer, readout=True)
    return Run(recipe, data, [c.CaptionStatistics(), readout, c.Retrieval()])


@run
def scenes(before: Path) -> Run:
    recipe = Contrastive(
        Towers(image=ConvTower([8], stem=4), text=TextTower(128, 8, 1, 2, 16)),
        8,
        negatives=Negatives(),
        knowledge=TripleEncoder(128, 8, 8, 1, 2),
        optimizer=adamw,
        chunks=2,
    )
    return Run(recipe, Scenes(batch_size=16, size=24, tiny=True, exchanged=True), [c.SwapAccuracy()])


@run
def self_supervised(before: Path) -> Run:
    towers = Towers(image=ConvTower([8], stem=4))
    objective = DINO(hidden=8, bottleneck=8, prototypes=8)
    recipe = SelfSupervised(towers, objective, crops=LocalCrops(number=2, size=8), optimizer=adamw)
    ood = c.OutOfDistribution({"other": emoji(groups=["symbols"])}, validate=True)
    probe = c.LinearProbe("group", shares=[0.1, 1.0])
    return Run(recipe, emoji(views={"image": 2}), [c.KNN("group"), probe, ood, c.Geometry()])


@run
def one_stage(before: Path) -> Run:
    towers = Towers(image=PatchTower(16, 8, 8, 1, 2), text=TextTower(8192, 8, 1, 2, 24))
    terms: dict[str, Any] = {"same": Normal(), "view": Boltzmann(), "text": Boltzmann(learn=True), "classes": 10}
    recipe = MutualInformation(towers, PatchMix(2), ViewDecoder(8, 1, 2), **terms, width=8, optimizer=adamw)
    return Run(recipe, emoji(views={"image": 2}, name_only=1.0), [c.Retrieval()])


@run
def mined(before: Path) -> Run:
    towers = Towers(image=ConvTower([8], stem=4), text=BagTower(512, 8))
    recipe = Contrastive(towers, 8, negatives=Negatives(denominator=True), optimizer=adamw)
    data = emoji(text=NgramTokenizer(buckets=512, length=24))
    return Run(recipe, data, [c.HardNegativeMiner(k=2, label="group")])


@run
def forks(before: Path) -> Run:
    recipe = Contrastive(pattern_towers("image", "text", "sketch"), 8, optimizer=adamw)
    harmonize = c.HarmonizeFeatures(GradVac(), Curriculum(warmup=0.0), audit="misaligned")
    emergent = c.EmergentRetrieval(["val"], [["sketch", "text"]], target=None)
    return Run(recipe, PatternData("image", "text", "sketch"), [c.Misalign("text"), harmonize, emergent])


@run
def attached(before: Path) -> Run:
    """A new modality to a tower of another run, and a saved tower."""
    model = node("Contrastive", *NAMES)["init_args"]["towers"]["init_args"]
    image = SavedTower(before / "clip", "image", checkpoint="last")
    towers = Towers(image=image, text=BagTower(**model["text"]["init_args"]))
    inherit = Inherit(before / "clip", ["text"], checkpoint="last")
    return Run(Contrastive(towers, 16, adapt=[inherit], optimizer=adamw), PatternData(), [c.LeanCheckpoint()])


@run
def matching(before: Path) -> Run:
    towers = pattern_towers()
    return Run(Matching(towers, CrossEncoder(8, 1, 2), negatives=3, optimizer=adamw), PatternData(), [c.Accuracy()])


@run
def multitask(before: Path) -> Run:
    words = MaskedTokens("text", TokenAdapter(8192, 24), given="image")
    patches = MaskedTokens("image", PatchAdapter([16, 16], 8), corruption=UniformMask(0.5))
    objectives = {"contrast": Contrast([["image", "text"]]), "match": Match(["image", "text"]), "words": words}
    objectives |= {"patches": patches, "group": Classify("group", 10, ["image", "text"])}
    towers = Towers(image=PatchTower(16, 8, 8, 1, 2), text=TextTower(8192, 8, 1, 2, 24))
    recipe = MultiTask(towers, objectives, 8, FusionLayers(8, 1, 2), optimizer=adamw)
    return Run(recipe, emoji(name_only=1.0), [c.Harmonize(PCGrad()), c.Accuracy(), c.Retrieval()])


@run
def self_distilled(before: Path) -> Run:
    """Two views with a teacher of the recipe's own, beside contrast."""
    objectives = {"contrast": Contrast([["image", "text"]]), "views": TwoViews("image", BYOL(8, 4))}
    towers = Towers(image=PatchTower(16, 8, 8, 1, 2), text=TextTower(8192, 8, 1, 2, 24))
    recipe = MultiTask(towers, objectives, 8, optimizer=adamw)
    return Run(recipe, emoji(name_only=1.0, views={"image": 2}), [c.Retrieval()])


@run
def tables(before: Path) -> Run:
    """Tables beside images: contrast, matching, and hidden columns."""
    pair = ["image", "table"]
    objectives = {"contrast": Contrast([pair]), "match": Match(pair), "columns": MaskedColumns(given="image")}
    towers = Towers(image=ConvTower([8], stem=4), table=TableTower(COLUMNS, 8, 1, 2))
    recipe = MultiTask(towers, objectives, 8, FusionLayers(8, 1, 2), embeds=[pair], optimizer=adamw)
    data = emoji(table=True, paired=True, missing=ColumnMissing(0.6))
    return Run(recipe, data, [c.Accuracy(), c.LinearProbe("group", "image+table")])


@run
def mplug2(before: Path) -> Run:
    words = MaskedTokens("text", TokenAdapter(8192, 24), given="image")
    objectives = {"contrast": Contrast([["image", "text"]]), "words": words, "group": Classify("group", 10, ["image"])}
    labels = Distill(TeacherAverage(0.9), [SoftLabels(["contrast", "words"])])
    towers = Towers(image=PatchTower(16, 8, 8, 1, 2), text=TextTower(8192, 8, 1, 2, 24))
    layers, graph = UniversalLayers(8, 2, 2, latents=3, sham="permute"), {"words": ["fusion"]}
    recipe = MultiTask(
        towers,
        objectives,
        8,
        FusionLayers(8, 1, 2),
        universal=layers,
        graph=cast(Any, graph),
        distill=labels,
        optimizer=adamw,
    )
    callbacks = [
        c.Accuracy(),
        c.Retrieval(),
        c.MeanOf(["accuracy_group", "i2t_r1"]),
        c.SpreadOf(["accuracy_group", "i2t_r1"]),
    ]
    return Run(recipe, emoji(name_only=1.0), callbacks)


@run
def skills(before: Path) -> Run:
    """Experts of the tokens of two modalities, of which each task declares some."""
    objectives: dict[str, TaskObjective] = {m: Classify("group", 10, [m]) for m in ("text", "image")}
    towers = Towers(image=PatchTower(16, 8, 8, 1, 2), text=TextTower(8192, 8, 1, 2, 24))
    layers = UniversalLayers(8, 2, 2, latents=None, experts=ExpertLayers(3, StaticSkill([[0, 1]]), every=2))
    recipe = MultiTask(towers, objectives, 8, universal=layers, optimizer=adamw)
    return Run(recipe, emoji(name_only=1.0), [c.Accuracy(), c.WithoutExperts({"one": [1]})])


@run
def tokenizers(before: Path) -> Run:
    """Two quantizers on the tokens of one tower."""
    adapter = PatchAdapter([16, 16], 8)
    objectives: dict[str, TaskObjective] = {"codes": QuantizedTokens("image", adapter, VQ(8, 4), depth=1, heads=2)}
    objectives["levels"] = QuantizedTokens("image", copy.deepcopy(adapter), FSQ([3, 4]), depth=1, heads=2)
    recipe = MultiTask(Towers(image=PatchTower(16, 8, 8, 1, 2)), objectives, 8, optimizer=adamw)
    return Run(recipe, emoji(), [c.Accuracy(), c.CodeUsage(), c.ReconstructionPictures(count=1)])


@run
def interbert(before: Path) -> Run:
    words = MaskedTokens("text", TokenAdapter(8192, 24), given="regions", corruption=SegmentMask())
    objectives = {"match": Match(["regions", "text"], within="group"), "words": words}
    objectives |= {"regions": MaskedRegions(8, 24, given="text")}
    towers = Towers(text=TextTower(8192, 8, 1, 2, 24), others={"regions": RegionTower(48, 8)})
    recipe = MultiTask(towers, objectives, 8, SingleThenTwo(8, 1, 2, upper=1, alone=True), optimizer=adamw)
    return Run(recipe, emoji(name_only=1.0, regions=Regions(words=8)), [c.Accuracy()])


@run
def ranked(before: Path) -> Run:
    """Begins as another run ended, and learns of it."""
    distill = Distill(
        TeacherRun(str(before / "clip"), "last"), [RankTarget(drawn=4, kept=2, weigh=TeacherConfidence())]
    )
    towers = Towers(image=ConvTower([16, 32]), text=BagTower(20, 16))
    begin = Begin(before / "clip", "last")
    return Run(Contrastive(towers, 16, adapt=[begin], distill=distill, optimizer=adamw), PatternData())


# classifiers --------------------------------------------------------------------------------------------------------


@run
def balanced(before: Path) -> Run:
    regularizers = [games.GreedyGame(permutations=2), games.LabelContrast(), games.Bottleneck(hidden=8)]
    recipe = patterns(fusion=LateFusion(), unimodal=True, regularizers=regularizers)
    return Run(
        recipe,
        Banked(),
        [
            c.Harmonize(PCGrad()),
            c.Balance(AGM(), noise=True),
            c.OPM(),
            c.AMCo(growth=1.0),
            c.MSES(patience=1),
            c.GradientBlending(),
            c.LearningSpeed(),
            c.Diagnose(every=1),
            c.Contributions(circles=1),
            c.Attacks(steps=2, limit=8, validate=True),
            c.Accuracy(),
            c.NonFinite("skip"),
        ],
    )


@run
def rebalanced(before: Path) -> Run:
    recipe = patterns(fusion=MMTMFusion())
    return Run(recipe, PatternData(), [c.GreedyRebalancing(epsilon=0.0, window=1), c.MSLR({"image": 2.0}, window=1)])


@run
def balanced_over_steps(before: Path) -> Run:
    recipe = patterns(fusion=LateFusion(), unimodal=True, regularizers=[LogitAlignment()])
    moved = c.Relearning(every=1, times=1)
    return Run(recipe, Banked(), [c.SampleResampling(warmup=0), c.LFM(), moved, c.Accuracy()])


@run
def balanced_as_learned(before: Path) -> Run:
    recipe = patterns(fusion=LateFusion(), unimodal=True, regularizers=[LatentAlignment()])
    seen = [c.Harmonize(MIMO()), c.ModalityResampling(warmup=0), c.LearnedLFM(every=1), c.Accuracy()]
    return Run(recipe, Banked(), seen)


class NumberedPatterns(Banked):
    """The label as a number, too."""

    def number_scale(self, target: str) -> tuple[float, float]:
        return 6.0, 3.0

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        label_B = batch.targets["label"]
        batch.targets["size"] = (3 * label_B.float()).masked_fill(label_B < 0, torch.nan)
        return batch


@run
def regression(before: Path) -> Run:
    recipe = Regression(pattern_towers(), "size", GaussianLikelihood(), width=8, unimodal=True, optimizer=adamw)
    return Run(recipe, NumberedPatterns(), [c.NumberErrors(), c.NumberProbe("size"), c.Accuracy()])


@run
def regression_among_others(before: Path) -> Run:
    objectives: dict[str, TaskObjective] = {"size": Regress("size", ["image"]), "kind": Classify("label", 4, ["text"])}
    recipe = MultiTask(pattern_towers("image", "text"), objectives, 8, optimizer=adamw)
    return Run(recipe, NumberedPatterns(), [c.NumberErrors(), c.Accuracy()])


@run
def boosted(before: Path) -> Run:
    recipe = ReconBoost(pattern_towers(), "label", 4, width=8, hidden=8, optimizer=adamw, boost=1, rectify=1)
    return Run(recipe, PatternData(), [c.Accuracy()])


@run
def towers_harmonized(before: Path) -> Run:
    teachers = Teachers({"image": str(before / "image")}, checkpoint="last")
    distill = Distill(TeacherAverage(0.5), [SoftTarget()])
    recipe = patterns(
        fusion=MidFusion(8),
        unimodal=True,
        width=16,
        regularizers=[teachers],
        distill=distill,
        schedule=WarmupCosine(0.5),
    )
    attack = c.AdversarialTraining({"image": 0.3}, steps=2)
    seen = [c.HarmonizeTowers(MMPareto()), c.PMR(every=1), c.Accuracy(), attack]
    return Run(recipe, PatternData(), seen, {"precision": "bf16-mixed"})


@run
def missing(before: Path) -> Run:
    recipe = MissingModality(before / "both", "last", bank=ModulationBank(), fill=PromptImputer(), optimizer=adamw)
    return Run(recipe, Banked(), [c.Accuracy(), c.ModalitySubsetEval()])


@run
def certified(before: Path) -> Run:
    recipe = Certified(before / "margins", "last", rows=16, optimizer=partial(torch.optim.SGD, lr=0.1))
    return Run(recipe, Banked(), [c.Accuracy(), c.Attacks(steps=1, certify=0.1, rows=8, limit=8, validate=True)])


@run
def ensemble(before: Path) -> Run:
    recipe = Ensemble({m: str(before / m) for m in NAMES}, "last", optimizer=partial(torch.optim.SGD, lr=0.1))
    return Run(recipe, PatternData(), [c.Accuracy()])


@run
def alternating(before: Path) -> Run:
    recipe = Alternating(pattern_towers(), target="label", classes=4, width=8, optimizer=adamw)
    return Run(recipe, PatternData(), [c.Accuracy()])


@run
def peers(before: Path) -> Run:
    students: list[Recipe] = [patterns(towers=pattern_towers(m), fusion=LateFusion()) for m in NAMES]
    return Run(Peers(students, optimizer=adamw), PatternData(), [c.Accuracy()])


# masked modelling ---------------------------------------------------------------------------------------------------


@run
def masked(before: Path) -> Run:
    adapters = Adapters(
        image=PatchAdapter([16, 16], 8),
        sketch=PatchAdapter([16, 16], 8, channels=1),
        palette=CategoryAdapter(11, [16, 16], 8),
    )
    recipe = Masked(
        adapters,
        Trunk(8, 1, 2),
        CrossDecoder(8, 1, 2),
        TokenBudget(4, subset_first=True),
        embeds=[["image"], ["image", "sketch"]],
        optimizer=adamw,
    )
    whole = c.Reconstruction(["image"], ["sketch"], patch=8, limit=32)
    pictures = c.ReconstructionPictures(count=2)
    seen: list[L.Callback] = [c.Accuracy(), whole, pictures]
    return Run(recipe, emoji(sketch=True, palette=True), seen, {"val_check_interval": 2})


@run
def any_to_any(before: Path) -> Run:
    adapters = Adapters(
        image=CodeAdapter(KMeansPatches([16, 16], 8, codes=4, samples=8)),
        palette=CategoryAdapter(11, [16, 16], 8),
        text=SequenceAdapter(8192, 24),
    )
    both = DirichletPair({"image": 1.0, "text": 0.5}, {"image": 0.5, "palette": 0.5, "text": 0.5})
    corruption, reduction = TwoBudgets(4, 6, [both], sequences=["text"]), MeanOfModalities()
    experts = ExpertLayers(2, TopKRouter(2), hidden=8, capacity=Capacity())
    encoder, decoder = Trunk(8, 1, 2, experts=experts), AnyToAnyDecoder(8, 1, 2)
    recipe = Masked(adapters, encoder, decoder, corruption, reduction=reduction, optimizer=adamw)
    pictures = c.GenerationPictures(["image", "text"], ["palette", "text"], Sampler(2, guidance=2.0), count=2)
    directions = c.CrossModalLoss(["image", "palette", "text"], limit=8)
    exact = c.GenerationAccuracy(["image"], "text", limit=8)
    seen: list[L.Callback] = [c.Accuracy(), pictures, directions, exact, c.ExpertUsage(limit=8)]
    return Run(recipe, emoji(palette=True), seen, {"val_check_interval": 2})


def codes(**others: Adapter) -> Adapters:
    return Adapters(
        image=CodeAdapter(KMeansPatches([16, 16], 8, codes=4, samples=8)), text=TokenAdapter(8192, 24), others=others
    )


@run
def extended(before: Path) -> Run:
    """Begins as a run of fewer modalities ended."""
    adapters = codes(
        dominant=CodeAdapter(PaletteTokens(4, 4)),
        orientations=CodeAdapter(VectorTokens(128, 4, 4, samples=8)),
        table=CodeAdapter(ScalarTokens(COLUMNS, bins=4, samples=8)),
    )
    recipe = Masked(adapters, Trunk(8, 1, 2), adapt=[Extend(before / "codes", "last")], optimizer=adamw)
    data = emoji(derived=["dominant", "orientations"], table=True)
    return Run(
        recipe, data, [c.Accuracy(), c.Steering(["text"], sampler=Sampler(2), limit=8)], {"val_check_interval": 2}
    )


# language -----------------------------------------------------------------------------------------------------------


@run
def chat(before: Path) -> Run:
    recipe = VisionLanguage(**small_chat(), visual=VisualSteps(0.5), optimizer=adamw)
    answering = Answering(new=2, by="kind", limit=8, validate=True)
    seen: list[L.Callback] = [c.Accuracy(), answering, c.PackingStatistics()]
    return Run(recipe, Questions(**ASKED), seen, {"precision": "bf16-mixed"})


@run
def captions(before: Path) -> Run:
    """A model of texts, of which visual experts begin with copies."""
    parts = small_chat() | {"lm": CausalLM(8194, 16, 1, 2, length=96, visual=VisualExperts())}
    stages = {"captions": Stage(train="experts|towers|projector", load=BeginText(before / "texts", "last"))}
    data = StagedData({"captions": StageData(Descriptions(tiny=True, size=24, length=64, batch_size=16), 1, 2)})
    return Run(Staged(VisionLanguage(**parts), stages, optimizer=adamw), data, [c.Stages()], {"max_epochs": -1})


@run
def rounds(before: Path) -> Run:
    distill = Distill(TeacherAverage(0.5))
    recipe = VisionLanguage(**small_chat(), distill=distill, optimizer=adamw)
    data = QuestionPool(**ASKED | {"items": 16})
    return Run(recipe, data, [c.Rounds(epochs=1, judge=LikelihoodScorer())], {"max_epochs": 3})


@run
def preferred(before: Path) -> Run:
    return Run(
        VisionLanguage(**small_chat(), objective=DPO(), distill=Distill(TeacherStage()), optimizer=adamw),
        QuestionPairs(**ASKED),
    )


@run
def reinforced(before: Path) -> Run:
    loss = PolicyLoss(kl=KL(0.1))
    axes = {"lm": CausalLM(8194, 16, 1, 2, length=96, positions=AxisRoPE()), "projector": PooledGrid(2)}
    parts = small_chat() | axes | {"visual": VisualAxes(frame=0.5)}
    recipe = VisionLanguage(**parts, objective=GRPO(loss), new=3, distill=Distill(TeacherStage()), optimizer=adamw)
    data = QuestionRollouts(**ASKED | {"items": 4, "group": 4})
    rollouts = c.Rollouts(Rewards({"right": ExactAnswer()}), resample=1)
    return Run(recipe, data, [rollouts], {"max_epochs": 3})


@run
def routed(before: Path) -> Run:
    """Experts that choose with noise, their causal routers, and pairs of what a stage has sampled."""
    router = moe.ExpertChoice([[0, 1], [2, 3]], auxiliary=moe.CausalAux(4), gumbel=True)
    lm = CausalLM(8194, 16, 1, 2, length=96, kinds=[300], experts=moe.ExpertLayers(4, router, hidden=8))
    data = StagedData(
        {
            "answers": StageData(Questions(**ASKED), 1, 1),
            "reward": StageData(QuestionRollouts(**ASKED | {"items": 4, "group": 4, "keep": 4}), 1),
            "pairs": StageData(RolloutPairs(of="reward", batch_size=16), 1),
        },
        evaluate="answers",
    )
    recipe = Staged(
        VisionLanguage(**small_chat() | {"lm": lm}, new=3),
        {"answers": Stage(), "reward": Stage(GRPO()), "pairs": Stage(DPO())},
        distill=Distill(TeacherStage()),
        optimizer=adamw,
    )
    return Run(recipe, data, [letters(), c.Stages(), c.Accuracy(), c.CausalGap(), c.ExpertsByEntropy()], steps=3)


@run
def staged(before: Path) -> Run:
    """One step of each kind of stage."""
    stages = {"captions": Stage(), "reward": Stage(GRPO(), r"^lm"), "pairs": Stage(DPO())}
    rolled = QuestionRollouts(**ASKED | {"items": 4, "group": 4})
    seen = {name: value for name, value in ASKED.items() if name != "kinds"}
    data = StagedData(
        {
            "captions": StageData(Descriptions(**seen), 1, 1),
            "reward": StageData(rolled, 1),
            "pairs": StageData(QuestionPairs(**ASKED), 1, 1),
        },
        evaluate="captions",
    )
    recipe = staged_model(stages, distill=Distill(TeacherStage()))
    return Run(recipe, data, [letters(), c.Stages()], steps=3)


def _of_paper(suite: OnDevice, before: Path) -> Run:
    return Run(suite.made(), suite.data(), suite.callbacks())


RUNS |= {name: partial(_of_paper, suite()) for name, suite in picked(OnDevice).items()}
