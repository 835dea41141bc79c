"""Self-supervised objectives over views of one modality, one file per method."""

from descant.modules.losses.views.barlow_twins import BarlowTwinsViews as BarlowTwinsViews
from descant.modules.losses.views.base import ViewObjective as ViewObjective
from descant.modules.losses.views.base import Views as Views
from descant.modules.losses.views.byol import BYOL as BYOL
from descant.modules.losses.views.dino import DINO as DINO
from descant.modules.losses.views.moco_v3 import MoCoV3 as MoCoV3
from descant.modules.losses.views.nnclr import NNCLR as NNCLR
from descant.modules.losses.views.queue import Queue as Queue
from descant.modules.losses.views.ressl import ReSSL as ReSSL
from descant.modules.losses.views.simclr import SimCLR as SimCLR
from descant.modules.losses.views.swav import SwAV as SwAV
from descant.modules.losses.views.vicreg import VICReg as VICReg
