"""Host reads and operations of a training step of what ships: ``python -m tests.device.reads`` prints the table.

    python -m tests.device.reads                    # all of it
    python -m tests.device.reads masked/ turns      # experiments with these in their names
    python -m tests.device.reads apart              # rollouts and validations

A step is what lies between the ends of two micro-batches in the middle of an epoch: loading, moving to the device,
forward, backward, the optimizer, all callbacks. None of it is a step that is logged, validated after, or saved.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch

if TYPE_CHECKING:  # importing it registers the device, which fixtures and the command below do
    from tests.device.emulated import Counts

ROOT = Path(__file__).parent.parent.parent
EXPERIMENTS = ROOT / "experiments"
TRUSTED = ("--trust", "tests.device.reads")
SETTINGS = """\
test: false
trainer:
  max_steps: 5
  max_epochs: -1
  log_every_n_steps: 1000
  limit_val_batches: 0
  callbacks+:
    - class_path: tests.device.reads.{callback}
"""


class Case(NamedTuple):
    """What is trained: an experiment and overlays.

    Attributes:
        configs: of ``descant fit``. options: beside them.
        allowed: host reads of a step. why: those are there. slow: whether it begins from other runs, or takes long.
    """

    configs: tuple[str, ...]
    options: tuple[str, ...] = ()
    allowed: int = 0
    why: str = ""
    slow: bool = False

    @property
    def name(self) -> str:
        return " ".join((*self.configs, *(o.removeprefix("--").replace("init_args.", "") for o in self.options)))


def _small(rows: int) -> tuple[str, ...]:
    """Enough batches that some step is in the middle of an epoch."""
    return ("--data.batch_size", str(rows))


#: Recipe -> what ships of it.
RECIPES: dict[str, list[Case]] = {
    "Contrastive": [
        Case(("contrastive/emoji", "with/train/missing-text")),
        Case(("contrastive/emoji", "with/train/siglip"), slow=True),
        Case(("contrastive/emoji", "with/train/gradcache", "with/train/missing-text"), slow=True),
        Case(("contrastive/emoji-gap", "papers/cross-the-gap"), slow=True),
        Case(("contrastive/scenes", "with/train/knowledge", "papers/structure-clip"), slow=True),
        Case(("contrastive/scenes", "with/train/hardest-hinge"), slow=True),
        Case(("contrastive/emoji-vit", "with/train/ema", "with/evaluate/throughput"), slow=True),
        Case(("contrastive/emoji-spoken",), slow=True),
        Case(("contrastive/clips",), slow=True),
    ],
    "SelfSupervised": [
        Case(("contrastive/views",)),
        Case(
            ("contrastive/views",),
            ("--model.objective", "{class_path: NNCLR, init_args: {hidden: 64, queue: 256}}"),
            slow=True,
        ),
        Case(("contrastive/views",), ("--model.objective", "{class_path: DINO, init_args: {hidden: 64}}"), slow=True),
    ],
    "MutualInformation": [Case(("multitask/one-stage",), slow=True)],
    "Masked": [
        Case(("masked/emoji",)),
        Case(("masked/pixels-and-codes",), slow=True),
        Case(("masked/extended",), ("--model.adapt", "[]"), slow=True),  # without the run that it begins from
        Case(("masked/speech",), _small(8), slow=True),
        Case(("masked/volumes",), slow=True),
        Case(("masked/landsat",), slow=True),
    ],
    "Fusion": [
        Case(("fusion/emoji",), slow=True),
        Case(("fusion/emoji", "with/train/attention-fusion", "with/balance/mcr"), slow=True),
        Case(("fusion/emoji", "with/balance/margins"), slow=True),
        Case(
            ("fusion/linear",),
            (
                "--trainer.callbacks+",
                "{class_path: AdversarialTraining, init_args: {radius: {a: 0.3, b: 0.2}, steps: 1}}",
            ),
            slow=True,
        ),
    ],
    "Alternating": [Case(("fusion/emoji", "with/balance/mla"), slow=True)],
    "Certified": [Case(("fusion/certified",), slow=True)],
    "ReconBoost": [Case(("fusion/emoji", "with/balance/reconboost"), slow=True)],
    "Ensemble": [Case(("fusion/ensemble",), slow=True)],
    "MissingModality": [Case(("missing/emoji",), slow=True)],
    "VisionLanguage": [
        Case(("chat/emoji",), slow=True),
        Case(("chat/frames",), slow=True),
        Case(
            ("chat/emoji",),
            (
                "--model.lm.init_args.depths",
                "{class_path: MixtureOfDepths, init_args: {auxiliary: {class_path: CausalAux}}}",
                "--model.lm.init_args.positions",
                "{class_path: InterleavedAxisRoPE}",
                "--model.visual",
                "{class_path: VisualAxes}",
            ),
            slow=True,
        ),
        Case(("chat/denoisers",), slow=True),
        Case(("reinforce/emoji",), slow=True),
    ],
    "Staged": [
        Case(("staged/emoji-codes",), slow=True),
        Case(("staged/emoji_vqa",), slow=True),
        Case(("staged/emoji-pairs",), slow=True),
    ],
    "MultiTask": [
        Case(("multitask/emoji",), slow=True),
        Case(("multitask/two-streams",), slow=True),
        Case(("multitask/universal",), slow=True),
        Case(("multitask/tokenizer",), slow=True),
    ],
    "Matching": [Case(("distill/emoji-teacher",), slow=True)],
    "Peers": [Case(("distill/emoji-peers",), slow=True)],
}

#: What learns of a teacher.
DISTILL = [Case(("distill/emoji-rank",), slow=True), Case(("distill/questions-rounds",), slow=True)]

GRAM = "the mix of a step hangs on its Gram matrices"
#: What reads once a step, or an optimizer step, wherever it is chosen.
CHOSEN = [
    Case(
        ("contrastive/emoji", "with/train/skip-nonfinite"),
        (),
        1,
        "a step is left out before it changes a weight",
        slow=True,
    ),
    Case(("masked/emoji", "with/harmonize/pcgrad"), (), 1, GRAM, slow=True),
    Case(("fusion/emoji", "with/balance/mmpareto"), (), 1, GRAM, slow=True),
    Case(("fusion/emoji", "with/balance/ogm"), (), 1, "factors of a step hang on its scores", slow=True),
    Case(("contrastive/stamps", "with/harmonize/cmgh"), _small(8), 1, GRAM, slow=True),
]


_VALIDATED = ("--trainer.limit_val_batches", "2", "--trainer.check_val_every_n_epoch", "1")
#: What is no step: how often the device is read in it.
APART = [
    ("rollout", Case(("reinforce/emoji",))),
    ("validation", Case(("contrastive/emoji",), _VALIDATED)),
    ("validation", Case(("masked/emoji",), _VALIDATED)),
    ("validation", Case(("chat/emoji",), _VALIDATED)),
]


class Windows(L.Callback):
    """Counts from the end of one micro-batch to the end of the next; ``found`` holds those within an epoch."""

    # of the last fit, since a command makes the callback: steps, and what is done beside them
    found: list[Counts] = []
    apart: dict[str, list[Counts]] = {}

    def __init__(self) -> None:
        self._open: Any = None
        self._beside: Any = None
        self.found.clear()
        self.apart.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        from tests.device.emulated import counting

        if self._open is not None:
            self._open[0].__exit__(None, None, None)
            self.found.append(self._open[1])
        context = counting()
        self._open = context, context.__enter__()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._open is not None:
            self._open[0].__exit__(None, None, None)
        self._open = None
        self._begin()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end("rollout")  # which Rollouts, before this in the list, has made by now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end("validation")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for opened in (self._open, self._beside):
            if opened is not None:
                opened[0].__exit__(None, None, None)
        self._open = self._beside = None

    def _begin(self) -> None:
        from tests.device.emulated import counting

        context = counting()
        self._beside = context, context.__enter__()

    def _end(self, what: str) -> None:
        if self._beside is not None:
            self._beside[0].__exit__(None, None, None)
            self.apart.setdefault(what, []).append(self._beside[1])
        self._beside = None


class Strict(L.Callback):
    """On CUDA: an error where a step in the middle of an epoch waits for the device; ``steps`` of the last fit."""

    steps: list[int] = []

    def __init__(self) -> None:
        self.steps.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        torch.cuda.set_sync_debug_mode("error")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.cuda.set_sync_debug_mode("default")


def measured(
    case: Case, run: Callable[..., tuple[int, str]], folder: Path, device: Sequence[str], callback: str = "Windows"
) -> list[Counts]:
    """Counts of the steps of a case, by ``run(*arguments)``: exit code and errors of a command.

    ``device``: options of a command that runs on it. ``callback``: ``Strict`` counts nothing, and lets nothing pass.
    """
    for config in case.configs:
        text = (EXPERIMENTS / f"{config}.yaml").read_text()
        for before in re.findall(r"^# Before: +descant (.+)$", text, re.MULTILINE):
            code, errors = run(*before.split(), "--config", "on/tiny", "--test", "false")
            assert code == 0, errors
    settings = folder / "reads.yaml"
    settings.write_text(SETTINGS.format(callback=callback))
    configs = [part for c in (*case.configs, "on/tiny", str(settings)) for part in ("--config", c)]
    code, errors = run("fit", *configs, *device, *case.options, "--name", "reads", *TRUSTED)
    assert code == 0, errors
    steps = len(Windows.found) if callback == "Windows" else len(Strict.steps) - 1
    assert steps > 0, f"{case.name}: no step in the middle of an epoch; smaller batches make more"
    return list(Windows.found) if callback == "Windows" else []


def _quiet(*arguments: str) -> tuple[int, str]:
    from descant.__main__ import main

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        return main(list(arguments)), errors.getvalue()


def _measured(case: Case) -> list[Counts]:
    """By the command in this process, in an empty folder."""
    from tests.device.accelerator import STRATEGY
    from tests.device.emulated import NAME, emulation

    device = ("--trainer.accelerator", NAME, "--trainer.strategy", STRATEGY, "--trainer.devices", "1")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), emulation():
        return measured(case, _quiet, Path(folder), device)


def table(cases: Sequence[tuple[str, Case]]) -> list[str]:
    """Lines of a table in Markdown: what is trained, host reads and operations of a step."""
    lines = ["| recipe | experiment | host reads a step | operations a step |", "|---|---|---|---|"]
    for recipe, case in cases:
        most = max(_measured(case), key=lambda c: (c.host_reads + c.uploads.total(), c.operations))
        why = f": {case.why}" if case.why else ""
        lines.append(f"| {recipe} | `{case.name}` | {most.host_reads}{why} | {most.operations:,} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def apart() -> list[str]:
    """Lines of a table in Markdown: what is no step, and how often the device is read in it."""
    lines = ["| what | experiment | host reads | operations |", "|---|---|---|---|"]
    for what, case in APART:
        _measured(case)
        counts = Windows.apart[what][-1]
        lines.append(f"| a {what} | `{' '.join(case.configs)}` | {counts.host_reads:,} | {counts.operations:,} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def every() -> list[tuple[str, Case]]:
    """Recipe (or part) and case, of all that are measured."""
    recipes = [(name, case) for name, cases in RECIPES.items() for case in cases]
    return [*recipes, *(("Distill", case) for case in DISTILL), *(("callback", case) for case in CHOSEN)]


if __name__ == "__main__":
    from tests.device import reads  # the module that the command finds the callback in

    os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp())
    asked = sys.argv[1:]
    chosen = [(recipe, case) for recipe, case in every() if not asked or any(a in case.name for a in asked)]
    print("\n".join(reads.table(chosen) if chosen else []))
    if not asked or "apart" in asked:
        print("", *reads.apart(), sep="\n")
