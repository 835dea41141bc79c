"""The recipes: one LightningModule a file; the order of the file is the order of the method."""

from descant.recipes.base import Recipe
from descant.recipes.contrastive import Contrastive

__all__ = ["Contrastive", "Recipe"]
