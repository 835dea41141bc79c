"""The recipes: one LightningModule per file; each file follows the order of its method."""

from descant.modules.objectives.language import DPO, GRPO, SFT
from descant.recipes.alternating import Alternating
from descant.recipes.base.distillation import TeacherAverage, TeacherRun, TeacherStage, TeacherTowers
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.stage import Stage
from descant.recipes.certified import Certified
from descant.recipes.competitive_distillation import CompetitiveDistillation
from descant.recipes.contrastive import Contrastive
from descant.recipes.ensemble import Ensemble
from descant.recipes.fusion import Fusion
from descant.recipes.masked import Masked
from descant.recipes.matching import Matching
from descant.recipes.missing import MissingModality
from descant.recipes.multitask import MultiTask
from descant.recipes.mutual_information import MutualInformation
from descant.recipes.peers import Peers
from descant.recipes.reconboost import ReconBoost
from descant.recipes.regression import Regression
from descant.recipes.self_supervised import SelfSupervised
from descant.recipes.staged import Staged
from descant.recipes.vision_language import VisionLanguage

__all__ = [
    "DPO",
    "GRPO",
    "SFT",
    "Alternating",
    "Certified",
    "CompetitiveDistillation",
    "Contrastive",
    "Ensemble",
    "Fusion",
    "Masked",
    "Matching",
    "MissingModality",
    "MultiTask",
    "MutualInformation",
    "Peers",
    "Recipe",
    "ReconBoost",
    "Regression",
    "SelfSupervised",
    "Stage",
    "Staged",
    "TeacherAverage",
    "TeacherRun",
    "TeacherStage",
    "TeacherTowers",
    "VisionLanguage",
]
