"""Data modules: corpora of files, mixtures and tasks. Each makes :class:`descant.modules.core.batch.Batch`.

``from descant.datamodules import Emoji`` imports only the module of Emoji.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from descant.modules.io.names import full, of_kind

if TYPE_CHECKING:
    from descant.datamodules.base import DataModule as DataModule
    from descant.datamodules.combined.mixture import Mixture as Mixture
    from descant.datamodules.combined.stages import StagedData as StagedData
    from descant.datamodules.combined.task_stream import TaskStream as TaskStream
    from descant.datamodules.corpora.crops import CropModule as CropModule
    from descant.datamodules.corpora.digits import Digits as Digits
    from descant.datamodules.corpora.emoji import Emoji as Emoji
    from descant.datamodules.corpora.fashion import Fashion as Fashion
    from descant.datamodules.corpora.frames import FrameRollouts as FrameRollouts
    from descant.datamodules.corpora.frames import Frames as Frames
    from descant.datamodules.corpora.landsat import Landsat as Landsat
    from descant.datamodules.corpora.moving_emoji import MovingEmoji as MovingEmoji
    from descant.datamodules.corpora.partial_information import PartialInformation as PartialInformation
    from descant.datamodules.corpora.scenes import Scenes as Scenes
    from descant.datamodules.corpora.series import Series as Series
    from descant.datamodules.corpora.snippets import Snippets as Snippets
    from descant.datamodules.corpora.stamps import Stamps as Stamps
    from descant.datamodules.corpora.volumes import Volumes as Volumes
    from descant.datamodules.tasks.denoised_texts import DenoisedTexts as DenoisedTexts
    from descant.datamodules.tasks.descriptions import Descriptions as Descriptions
    from descant.datamodules.tasks.dialogues import Dialogues as Dialogues
    from descant.datamodules.tasks.question_pool import PooledQuestions as PooledQuestions
    from descant.datamodules.tasks.question_pool import QuestionPool as QuestionPool
    from descant.datamodules.tasks.question_pool import QuestionRollouts as QuestionRollouts
    from descant.datamodules.tasks.questions import QuestionPairs as QuestionPairs
    from descant.datamodules.tasks.questions import Questions as Questions
    from descant.datamodules.tasks.rated_questions import RatedQuestions as RatedQuestions
    from descant.datamodules.tasks.rollout_buffer import PooledDialogues as PooledDialogues
    from descant.datamodules.tasks.rollout_buffer import RolledDialogues as RolledDialogues
    from descant.datamodules.tasks.rollout_pairs import RolloutPairs as RolloutPairs
    from descant.datamodules.tasks.text_tasks import TaskRollouts as TaskRollouts
    from descant.datamodules.tasks.text_tasks import TextTasks as TextTasks
    from descant.datamodules.user.user_data import UserData as UserData


def __getattr__(name: str) -> Any:
    # jsonargparse looks for a class in each parent package of its module, to write the shortest path into config.yaml.
    # It has no option for the full path. Earlier runs recorded the full path, and a resumed run is compared with them.
    if name not in __dir__() or sys._getframe(1).f_code.co_name == "get_import_path":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = full(name)
    assert path is not None
    return getattr(importlib.import_module(path.rpartition(".")[0]), name)


def __dir__() -> list[str]:
    return sorted({"DataModule", *of_kind("DataModule", "datamodules")})
