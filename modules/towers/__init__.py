"""Towers: encoders that turn the input of one modality into tokens.

Pooling and projection are separate (``modules.towers.heads``). timm, transformers and open_clip are imported when a
tower needs them, not here.
"""

from descant.modules.towers.any_size import AnySizeTower as AnySizeTower
from descant.modules.towers.audio import LogMelTower as LogMelTower
from descant.modules.towers.base import Frozen as Frozen
from descant.modules.towers.base import Tokens as Tokens
from descant.modules.towers.base import Tower as Tower
from descant.modules.towers.base import Towers as Towers
from descant.modules.towers.image import ConvTower as ConvTower
from descant.modules.towers.image import PatchEmbed as PatchEmbed
from descant.modules.towers.image import PatchTower as PatchTower
from descant.modules.towers.pretrained import PretrainedTower as PretrainedTower
from descant.modules.towers.regions import RegionTower as RegionTower
from descant.modules.towers.series import SeriesTower as SeriesTower
from descant.modules.towers.table import TableTower as TableTower
from descant.modules.towers.text import BagTower as BagTower
from descant.modules.towers.text import TextTower as TextTower
from descant.modules.towers.timm import TimmTower as TimmTower
from descant.modules.towers.transformers import TransformersTower as TransformersTower
from descant.modules.towers.vector import VectorTower as VectorTower
from descant.modules.towers.video import VideoTower as VideoTower
