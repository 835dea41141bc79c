"""The callbacks: they depend on the protocols of :mod:`descant.modules.core.protocols`, and never on a recipe.

Of a class with ``once = True`` that is listed several times (by an experiment and an overlay), the last one is used.
"""

from descant.callbacks.balance.amco import AMCo as AMCo
from descant.callbacks.balance.balance import Balance as Balance
from descant.callbacks.balance.g_blending import GradientBlending as GradientBlending
from descant.callbacks.balance.lfm import LFM as LFM
from descant.callbacks.balance.lfm import LearnedLFM as LearnedLFM
