"""The callbacks: they know the protocols of :mod:`descant.modules.protocols`, and never a recipe."""

from descant.callbacks.captions import CaptionStatistics as CaptionStatistics
from descant.callbacks.ema import EMA as EMA
from descant.callbacks.emergent import EmergentRetrieval as EmergentRetrieval
from descant.callbacks.evaluate import KNN as KNN
from descant.callbacks.evaluate import Geometry as Geometry
from descant.callbacks.evaluate import Judge as Judge
from descant.callbacks.evaluate import LinearProbe as LinearProbe
from descant.callbacks.evaluate import Retrieval as Retrieval
from descant.callbacks.evaluate import ZeroShot as ZeroShot
from descant.callbacks.inversion import IntraModal as IntraModal
from descant.callbacks.inversion import Inversion as Inversion
from descant.callbacks.lean import LeanCheckpoint as LeanCheckpoint
from descant.callbacks.nonfinite import NonFinite as NonFinite
from descant.callbacks.pictures import Projector as Projector
from descant.callbacks.pictures import RetrievalPictures as RetrievalPictures
from descant.callbacks.progress import Progress as Progress
from descant.callbacks.readout import Readout as Readout
from descant.callbacks.report import Report as Report
from descant.callbacks.resume import Resume as Resume
from descant.callbacks.sanity import Sanity as Sanity
from descant.callbacks.swap import SwapAccuracy as SwapAccuracy
from descant.callbacks.temperature import Temperature as Temperature
from descant.callbacks.throughput import Throughput as Throughput
