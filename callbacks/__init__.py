"""The callbacks: they depend on the protocols of :mod:`descant.modules.core.protocols`, and never on a recipe.

Of a class with ``once = True`` that is listed several times (by an experiment and an overlay), the last one is used.
"""

from descant.callbacks.balance.balance import Balance as Balance
from descant.callbacks.balance.g_blending import GradientBlending as GradientBlending
from descant.callbacks.balance.opm import OPM as OPM
from descant.callbacks.balance.pmr import PMR as PMR
from descant.callbacks.evaluate.accumulation import Accumulation as Accumulation
from descant.callbacks.evaluate.accuracy import Accuracy as Accuracy
from descant.callbacks.evaluate.answering import Answering as Answering
from descant.callbacks.evaluate.attacks import Attacks as Attacks
from descant.callbacks.evaluate.caption_statistics import CaptionStatistics as CaptionStatistics
from descant.callbacks.evaluate.classification import KNN as KNN
from descant.callbacks.evaluate.classification import LinearProbe as LinearProbe
from descant.callbacks.evaluate.classification import ZeroShot as ZeroShot
from descant.callbacks.evaluate.contributions import Contributions as Contributions
from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator as EmbeddingEvaluator
from descant.callbacks.evaluate.geometry import Geometry as Geometry
from descant.callbacks.evaluate.inversion import IntraModal as IntraModal
from descant.callbacks.evaluate.inversion import Inversion as Inversion
from descant.callbacks.evaluate.learning_speed import LearningSpeed as LearningSpeed
from descant.callbacks.evaluate.projector import Projector as Projector
from descant.callbacks.evaluate.readout import Readout as Readout
from descant.callbacks.evaluate.reconstruction import Reconstruction as Reconstruction
from descant.callbacks.evaluate.reconstruction import ReconstructionPictures as ReconstructionPictures
from descant.callbacks.evaluate.retrieval import EmergentRetrieval as EmergentRetrieval
from descant.callbacks.evaluate.retrieval import Retrieval as Retrieval
from descant.callbacks.evaluate.retrieval_pictures import RetrievalPictures as RetrievalPictures
from descant.callbacks.evaluate.subsets import ModalitySubsetEval as ModalitySubsetEval
from descant.callbacks.evaluate.swap_accuracy import SwapAccuracy as SwapAccuracy
from descant.callbacks.evaluate.worst_group import WorstGroup as WorstGroup
from descant.callbacks.harmonize.features import HarmonizeFeatures as HarmonizeFeatures
from descant.callbacks.harmonize.terms import Harmonize as Harmonize
from descant.callbacks.harmonize.towers import HarmonizeTowers as HarmonizeTowers
from descant.callbacks.policy.rollouts import Rollouts as Rollouts
from descant.callbacks.policy.rounds import Rounds as Rounds
from descant.callbacks.run.adversarial_training import AdversarialTraining as AdversarialTraining
from descant.callbacks.run.budget import Budget as Budget
from descant.callbacks.run.ema import EMA as EMA
from descant.callbacks.run.hard_negative_miner import HardNegativeMiner as HardNegativeMiner
from descant.callbacks.run.lean_checkpoint import LeanCheckpoint as LeanCheckpoint
from descant.callbacks.run.mismatched_pairs import Misalign as Misalign
from descant.callbacks.run.mixture_shares import MixtureShares as MixtureShares
from descant.callbacks.run.nonfinite import NonFinite as NonFinite
from descant.callbacks.run.packing_statistics import PackingStatistics as PackingStatistics
from descant.callbacks.run.progress import Progress as Progress
from descant.callbacks.run.progressive_resizing import ProgressiveResizing as ProgressiveResizing
from descant.callbacks.run.raise_temperature_late import Temperature as Temperature
from descant.callbacks.run.report import Report as Report
from descant.callbacks.run.resume import Resume as Resume
from descant.callbacks.run.sanity import Sanity as Sanity
from descant.callbacks.run.stages import Stages as Stages
from descant.callbacks.run.throughput import Throughput as Throughput
from descant.callbacks.run.train_flops import TrainFlops as TrainFlops
