"""The recipes: one LightningModule a file; the order of the file is the order of the method."""

from descant.recipes.alternating import Alternating
from descant.recipes.base.distillation import TeacherAverage, TeacherRun, TeacherStage
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.stage import Imitate, Prefer, Reinforce, Stage
from descant.recipes.certified import Certified
from descant.recipes.chat import Chat
from descant.recipes.contrastive import Contrastive
from descant.recipes.ensemble import Ensemble
from descant.recipes.fusion import Fusion
from descant.recipes.masked import Masked
from descant.recipes.matching import Matching
from descant.recipes.missing import MissingModality
from descant.recipes.peers import Peers
from descant.recipes.preferred import Preferred
from descant.recipes.reinforced import Reinforced
from descant.recipes.staged import Staged

__all__ = [
    "Alternating",
    "Certified",
    "Chat",
    "Contrastive",
    "Ensemble",
    "Fusion",
    "Imitate",
    "Masked",
    "Matching",
    "MissingModality",
    "Peers",
    "Prefer",
    "Preferred",
    "Recipe",
    "Reinforce",
    "Reinforced",
    "Stage",
    "Staged",
    "TeacherAverage",
    "TeacherRun",
    "TeacherStage",
]
