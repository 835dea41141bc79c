"""Policy-gradient and preference losses for language models (GRPO, Dr. GRPO, DAPO, BNPO, GSPO, CISPO, DPO), and
advantages."""

from descant.modules.policy.advantages import Advantage as Advantage
from descant.modules.policy.advantages import AdvantageOutput as AdvantageOutput
from descant.modules.policy.advantages import BatchScaled as BatchScaled
from descant.modules.policy.advantages import Centred as Centred
from descant.modules.policy.advantages import EachScaled as EachScaled
from descant.modules.policy.advantages import GroupScaled as GroupScaled
from descant.modules.policy.losses import CISPO as CISPO
from descant.modules.policy.losses import KL as KL
from descant.modules.policy.losses import Aggregation as Aggregation
from descant.modules.policy.losses import AnswerRatio as AnswerRatio
from descant.modules.policy.losses import Clipped as Clipped
from descant.modules.policy.losses import Counts as Counts
from descant.modules.policy.losses import LocalTokenMean as LocalTokenMean
from descant.modules.policy.losses import PolicyBatch as PolicyBatch
from descant.modules.policy.losses import PolicyLoss as PolicyLoss
from descant.modules.policy.losses import Ratio as Ratio
from descant.modules.policy.losses import SequenceMean as SequenceMean
from descant.modules.policy.losses import SequenceSum as SequenceSum
from descant.modules.policy.losses import Surrogate as Surrogate
from descant.modules.policy.losses import TokenMean as TokenMean
from descant.modules.policy.losses import TokenRatio as TokenRatio
from descant.modules.policy.preference import DPOLoss as DPOLoss
