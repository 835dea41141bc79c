"""Old class names, import paths and arguments -> present ones: configurations, runs and checkpoints of before load.

Names are replaced where they are read, each with one line of notice:
``descant: config.yaml:12: Blend is now GradientBlending``. A present name always wins over an old one.

To rename a class, add a row to CLASSES; to move one, nothing (an import path without that class is resolved by the
class name); to rename an argument, add it to ARGUMENTS; to remove a class, add it to GONE.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from descant.modules.io import names
from descant.modules.io.upgrade import upgrade

#: Old class name -> present one.
CLASSES = {
    **dict(Chat="VisionLanguage", Imitate="SFT", Prefer="DPO", Reinforce="GRPO"),
    **dict(Advances="StagedRecipe", Alike="UniformWeighting", AnswerJudge="AnswerScorer", Asked="FusionContext"),
    **dict(Behind="StudentLag", Blend="GradientBlending", Blocked="BlockShuffle", Bpe="BPETokenizer"),
    **dict(Bytes="ByteTokenizer", Codec="Tokenizer", Contends="MultimodalClassifier", Decided="FusionInputs"),
    **dict(Drawn="PolicyBatch", DropAhead="OPM", During="StageData", EditJudge="EditDistanceScorer"),
    **dict(ExactJudge="ExactMatchScorer", Fill="Imputer", Forks="ForksFeatures", Fuse="FusionHead"),
    **dict(InStages="StagedDataModule", Judge="EmbeddingEvaluator", Judged="AdvantageOutput", Kept="ImageCache"),
    **dict(
        Lesson="DistillContext", LikelihoodJudge="LikelihoodScorer", MeanFill="MeanImputer", Measured="MeasuredCaption"
    ),
    **dict(Ngrams="NgramTokenizer", Own="UserData", OwnPass="ForwardEvaluator", OwnSet="UserDataset"),
    **dict(Pareto="MMPareto", Pooled="QuestionPoolData", Pretrained="PretrainedTokenizer", Prototypes="PMR"),
    **dict(PromptFill="PromptImputer", Realign="CMGH", Rebuilt="ReconstructionOutput", Replies="AnswersQuestions"),
    **dict(Rolled="RolloutData", Rolls="RolloutPolicy", Said="Decisions", SaidNames="SpokenNamesSource"),
    **dict(Says="MakesDecisions", Shown="ShownImages", Solved="SolverRule", Still="FrozenBatchNormStats"),
    **dict(Sure="TeacherConfidence", Told="ResumableLog", Uncertainty="UncertaintyWeighting"),
    **dict(Unsure="TeacherUncertainty", Votes="SoftVoting", Words="WordTokenizer", ZeroFill="ZeroImputer"),
}
#: Present class name -> old argument -> present one.
ARGUMENTS: dict[str, dict[str, str]] = {
    "Masked": {"zeros": "fill"},
    "Stage": {"learns": "objective"},
    "TextField": {"codec": "tokenizer"},
}
#: Class and old argument -> old value -> present one, where the values of an argument changed with its name.
VALUES: dict[tuple[str, str], dict[Any, Any]] = {
    ("Masked", "zeros"): {True: "descant.modules.missing_modalities.imputation.ZeroImputer", False: None},
}
#: Old class name -> what there is in its place, of classes that were removed.
GONE: dict[str, str] = {
    "EachMask": "one corruption for all modalities, such as UniformMask",
    "Overlong": "Rollouts(cut: leave) leaves out answers that were cut off",
    "PrepareError": "ValueError",
    "Preferred": "VisionLanguage with objective: DPO",
    "Reinforced": "VisionLanguage with objective: GRPO",
}
#: Beginnings of import paths that are resolved by class name where no such class is there (any more).
_MOVED = tuple(f"descant.{part}" for part in ("recipes", "callbacks", "datamodules", "modules", "loggers"))
#: Old path -> present one, where the class name alone does not tell.
PATHS = {
    "descant.datamodules.changed.Corpus": "descant.datamodules.changes.Corpus",
    "descant.datamodules.changed.Rules": "descant.datamodules.changes.DataPolicy",
    "descant.datamodules.frames.Source": "descant.datamodules.corpora.frames.Source",
    "descant.modules.decoders.Places": "descant.modules.masking.decoders.Places",
    "descant.modules.masking.Ratio": "descant.modules.masking.corruptions.Ratio",
    "descant.modules.reinforce.rewards.Judge": "descant.modules.policy.rewards.VerifierProcess",
    "descant.modules.reinforce.Ratio": "descant.modules.policy.losses.Ratio",
    "descant.modules.reinforce.policy.Ratio": "descant.modules.policy.losses.Ratio",
    "descant.store.AtomicIO": "descant.run.store.AtomicIO",
}
_noticed: set[str] = set()


def current(name: str) -> str:
    """The present name of a class, short or an import path; ``name`` itself where it is no old one.

    >>> current("Blend"), current("EMA"), current("os.path")
    ('GradientBlending', 'EMA', 'os.path')
    >>> current("descant.callbacks.ema.EMA"), current("descant.callbacks.EMA")
    ('descant.callbacks.run.ema.EMA', 'descant.callbacks.EMA')
    """
    if "." not in name:
        return CLASSES.get(name, name) if name not in names.table() else name
    if not all(map(str.isidentifier, name.split("."))):
        return name
    module, _, last = name.rpartition(".")
    if name in PATHS:
        return PATHS[name]
    if not module.startswith(_MOVED) or _is_there(module, last):
        return name
    paths = names.table().get(CLASSES.get(last, last), ())
    if len(paths) > 1:  # the one in the same part of the package
        paths = tuple(path for path in paths if path.split(".")[:2] == name.split(".")[:2])
    return paths[0] if len(paths) == 1 else name


def _is_there(module: str, name: str) -> bool:
    """Whether a module of the package defines a class, or is a package that exports it."""
    if any(one.path == f"{module}.{name}" for one in names.classes().get(name, ())):
        return True
    init = names.PACKAGE.joinpath(*module.split(".")[1:], "__init__.py")
    if not os.path.isfile(init):  # of a name of any length: Path.is_file raises for one that no file can have
        return False
    return name in init.read_text(encoding="utf-8").replace('"', " ").replace(",", " ").split()


def read(name: str, where: str) -> str:
    """:func:`current`, with a notice the first time that an old name is met in a run.

    Args:
        where: file and line, or option, for the notice.
    """
    new = current(name)
    if new != name:
        notice(where, name, new)
    elif (last := name.rpartition(".")[2]) in GONE and last not in names.table():
        raise ValueError(f"{name} was removed: {GONE[last]}")
    return new


def notice(where: str, old: str, new: str) -> None:
    """One line for each renamed class or argument, and one for all that only moved; of rank 0 alone."""
    moved = old.rpartition(".")[2] == new.rpartition(".")[2]
    key = "" if moved else old.rpartition(".")[2]
    if key in _noticed or any(os.environ.get(rank, "0") != "0" for rank in ("RANK", "SLURM_PROCID", "LOCAL_RANK")):
        return
    _noticed.add(key)
    others = "; other import paths of before are read likewise" if moved else ""
    print(f"descant: {where}: {old} is now {new}{others}", file=sys.stderr, flush=True)


def forget() -> None:
    """Begin a new run: each old name gets its notice again."""
    _noticed.clear()


def rename_arguments(name: str, arguments: dict[str, Any], where: str = "") -> bool:
    """Rename the old arguments of a class in place; whether there was one. A present name beside it is left to fail."""
    rows = {old: new for old, new in ARGUMENTS.get(name.rpartition(".")[2], {}).items() if old in arguments}
    rows = {old: new for old, new in rows.items() if new not in arguments}
    for old, new in rows.items():
        _renew_value(arguments, old, VALUES.get((name.rpartition(".")[2], old), {}))
        if where:
            notice(getattr(arguments[old], "where", where), f"{name.rpartition('.')[2]}.{old}", new)
    if rows:
        items = [(rows.get(key, key), value) for key, value in arguments.items()]
        arguments.clear()
        arguments.update(items)
    return bool(rows)


def _renew_value(arguments: dict[str, Any], key: str, values: dict[Any, Any]) -> None:
    """Replace an old value by the present one; the value may be a node, which has it as its content."""
    value = arguments[key]
    old = getattr(value, "content", value)
    if not isinstance(old, bool | int | float | str) or old not in values:
        return
    if value is old:
        arguments[key] = values[old]
    else:
        value.content = values[old]


def config(value: Any, where: str = "") -> Any:
    """A plain configuration with its old names replaced, at any depth; without ``where`` there are no notices."""

    def notice_line(line: str) -> None:
        if where:
            old, _, new = line.partition(" is now ")
            notice(where, old, new)

    return _renamed(upgrade(value, notice_line), where)


def _renamed(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_renamed(item, where) for item in value]
    if not isinstance(value, Mapping):
        return value
    content = {key: _renamed(item, where) for key, item in value.items()}
    if isinstance(name := content.get("class_path"), str):
        content["class_path"] = read(name, where) if where else current(name)
        if isinstance(arguments := content.get("init_args"), dict):
            rename_arguments(content["class_path"], arguments, where)
    return content


def checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint whose states are found by the present classes: of callbacks, of the data module, of a resume point.

    Lightning keeps a callback's state under the name of its class, or ``NAME{...}``, and a data module's likewise.
    """
    if isinstance(states := content.get("callbacks"), dict):
        content["callbacks"] = {_state_key(key): state for key, state in states.items()}
    for key in [key for key in content if key in CLASSES]:
        content[current(key)] = content.pop(key)
    facts = content.get("descant")
    if isinstance(facts, dict) and isinstance(facts.get("recipe"), str):
        content["descant"] = {**facts, "recipe": current(facts["recipe"])}
    return content


def _state_key(key: str) -> str:
    name, brace, rest = key.partition("{")
    return current(name) + brace + rest
