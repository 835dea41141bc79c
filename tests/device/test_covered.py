"""What ships is tried on the device, or it is said here why it need not be: a new class or metric fails until it is."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from descant.callbacks import Resume
from descant.modules.evaluation import metrics
from descant.modules.io.names import classes
from tests._suites.discovery import abstract
from tests.device.parts import PARTS
from tests.device.runs import RUNS, prepare

#: What needs no device, or more than one: name -> why.
NEEDLESS = {
    # of the CPU, whatever trains
    "BPETokenizer": "text to token ids, in the loader",
    "ByteTokenizer": "text to token ids, in the loader",
    "NgramTokenizer": "text to token ids, in the loader",
    "WordTokenizer": "text to token ids, in the loader",
    "PretrainedTokenizer": "text to token ids, in the loader",
    "ColumnMissing": "hides cells of a table, in the loader",
    "Denoiser": "chooses tokens of texts, in the loader",
    "SpanCorruption": "chooses tokens of texts, in the loader",
    "Suffix": "chooses tokens of texts, in the loader",
    "MixtureOfDenoisers": "corrupts texts, in the loader",
    "TaskAnswer": "judges strings",
    "NumericAnswer": "judges strings",
    "Format": "judges strings",
    "Part": "judges strings",
    "JsonTable": "judges strings",
    "VerifierProcess": "judges strings",
    "InverseSquareRoot": "numbers of the host, as WarmupCosine, which is tried",
    "MetaSchedule": "numbers of the host, as WarmupCosine, which is tried",
    "WarmupStableDecay": "numbers of the host, as WarmupCosine, which is tried",
    "REX": "numbers of the host, as WarmupCosine, which is tried",
    "Groups": "a list of what an optimizer takes, whose parameters are tried",
    "Share": "names and sizes of what an optimizer of a group takes",
    "ScheduleFree": "copies weights as EMA does, which is tried; the optimizer is of the package schedulefree",
    "Selection": "row numbers of a pool, before anything trains",
    "Selector": "chooses rows of a table, before anything trains",
    "RichScorer": "regressions on the host, before anything trains",
    "PseudoCaptions": "chooses phrases on the host, before anything trains",
    "WritePseudoCaptions": "embeds phrases as ZeroShot does, and writes a table on the host, in predictions",
    "Styler": "regressions on the host, before anything trains",
    "ScoreFilter": "chooses rows of a table, before anything trains",
    "Quota": "chooses rows of a table, before anything trains",
    "RandomShare": "chooses rows of a table, before anything trains",
    "Assemble": "reads runs on the host, and then changes a model as Upcycle does",
    "GrowthSpace": "grows as Grow does; its trials are steps of the recipe",
    "Report": "writes what was measured: tests of the command line run it, on the device too",
    "Progress": "prints what was measured: tests of the command line run it, on the device too",
    "CSV": "writes numbers: tests of the command line run it, on the device too",
    "TensorBoard": "writes numbers: tests of the command line run it, on the device too",
    "Tracker": "writes numbers of the host, as CSV does",
    "Wandb": "writes numbers of the host, as CSV does",
    "MLflow": "writes numbers of the host, as CSV does",
    "Trackio": "writes numbers of the host, as CSV does",
    "Board": "images and texts of the host",
    "Table": "texts of the host",
    "TensorBoardBoard": "images and texts of the host",
    "OperationProfile": "measures a step of the CPU or of CUDA, which emulated devices have no clock for",
    "Verified": "hashes a file of weights, in a thread",
    "FlopCount": "counts operators of the CPU's or a GPU's dispatcher: benchmarks",
    "MemoryLedger": "counts bytes of the CPU's or a GPU's dispatcher: `check`, and budgets of memory-adjusted FLOPs",
    "SavedTokenizer": "rebuilt from files; what it computes with is QuantizedTokens, which is tried",
    "Budget": "sets the number of steps, on the host; what it counts is tried as FlopCount",
    "CompetitiveDistillation": "delegates to the recipe that it wraps, which is tried with a teacher",
    "Forgetting": "subtracts numbers of the host",
    "MixtureShares": "logs numbers of the data module, on the host",
    "Output": "holds what a recipe returns",
    "Best": "keeps the best of the candidates of a solver, which are tried",
    # other devices
    "Compile": "a compiler has no code for an emulated device; `make gpu` compiles",
    "Quantize": "kernels of bitsandbytes; `make gpu`",
    "Shard": "several ranks",
    "Passing": "several ranks",
    "Blocks": "base of Chunks and Ring, which are tried",
    "AllGather": "names what a loss does that is given none, which is tried",
    "ExpertGroup": "several ranks",
    "PartTable": "reads files into memory of the CPU",
    "Parted": "reads files into memory of the CPU",
    "Name": "a name in a checkpoint's index",
    # weights in a package
    "PretrainedLM": "needs a package of weights; CausalLM is what it computes with",
    "TransformersTower": "needs a folder of weights or transformers: tests marked slow",
    "TimmTower": "timm's own modules: tests marked slow",
    "PretrainedTower": "modules of the packages that own them, from a folder; one multiplication of ours",
    "TeacherTowers": "holds PretrainedTowers; what it teaches by is FeatureTarget, which is tried",
}
#: Made by a class that is tried.
MADE = {
    "Inputs": "Reconstruction",
    "Embeddings": "Contrastive",
    "Streams": "MultiTask",
    "NullFit": "Reconstruction",
    "Signals": "Resume",
    **dict.fromkeys(
        ("Heartbeat", "Settings", "Verdict", "Where", "Head", "Seen", "Phases", "Window", "Split"), "Watch"
    ),
}


def concrete() -> dict[str, str]:
    """Name -> module of the public classes of recipes, modules and callbacks that compute something."""
    found = {}
    for name, places in classes().items():
        for place in places:
            module = place.path.rpartition(".")[0]
            if name.startswith("_") or not module.startswith(
                ("descant.recipes", "descant.modules", "descant.callbacks")
            ):
                continue
            kind = getattr(importlib.import_module(module), name)
            plain = issubclass(kind, tuple | Exception) or getattr(kind, "_is_protocol", False)
            if not plain and not abstract(kind):
                found[name] = module
    return found


def walked(value: Any, seen: dict[int, Any]) -> None:
    """Everything of descant that a value holds."""
    if id(value) in seen or isinstance(value, torch.Tensor | str | bytes | int | float):
        return
    if isinstance(value, dict | list | tuple | set | nn.ModuleDict | nn.ModuleList):
        seen[id(value)] = value
        for inner in value.values() if isinstance(value, dict | nn.ModuleDict) else value:
            walked(inner, seen)
        if not isinstance(value, nn.Module):
            return
    if type(value).__module__.startswith("descant."):
        seen[id(value)] = value
        for inner in vars(value).values():
            walked(inner, seen)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of all classes that a part names or a run is made of."""
    before, seen = prepare(tmp_path_factory.mktemp("before")), dict[int, Any]()
    walked(Resume(), seen)  # of every run
    for make in RUNS.values():
        run = make(before)
        walked([run.recipe, run.callbacks], seen)
    return set(PARTS) | {base.__name__ for value in seen.values() for base in type(value).__mro__}


def test_every_class_is_tried_or_it_is_said_why_not(tried: set[str]) -> None:
    left = {name: module for name, module in concrete().items() if name not in {*tried, *NEEDLESS, *MADE}}
    assert not left, f"try them in tests/device/parts.py or runs.py: {left}"


def test_what_needs_no_trial_is_there_and_is_not_tried(tried: set[str]) -> None:
    assert not set(NEEDLESS) - set(classes()), "gone"
    assert not {name for name in NEEDLESS if name in tried}, "tried after all"
    assert set(MADE.values()) <= tried


def test_every_metric_is_tried() -> None:
    public = {n for n, f in vars(metrics).items() if inspect.isfunction(f) and f.__module__ == metrics.__name__}
    assert {name for name in public if not name.startswith("_")} <= set(PARTS)
