"""Own recipes and modules under plain Lightning trainers, and which samples each rank reads.

``python -m tests.plain_trainers FOLDER`` runs sixty combinations, each in processes of its own as a user starts them,
and prints a table: every sample once an epoch, in training, validation, test and prediction, or one line of refusal.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader

from descant.datamodules import Emoji
from descant.datamodules.base import BatchDataset, DataModule
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.fields.fields import Fields, ImageField, TextField
from descant.datamodules.sources.stream import Stream
from descant.datamodules.user.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.towers import Tokens, Tower, Towers
from descant.recipes.base.recipe import Recipe
from descant.recipes.contrastive import Contrastive
from tests._suites.data import SampleData, Samples
from tests.datamodules.test_streams import noise
from tests.files import write_tar
from tests.ranks import free_port, keep_groups, run_ranks, stand_alone

#: Seconds after which each rank of a script writes where it hangs and ends.
LONGEST = 300
#: Rows of a step, and samples of data that the caller's own loader reads.
B, OWN = 8, 48


class Case(NamedTuple):
    """One combination: ``length`` is epochs, steps or limit (of batches); ``split``: Lightning's default."""

    launch: str = "ddp"
    model: str = "recipe"
    data: str = "samples"
    accumulate: int = 1
    loggers: int = 0
    length: str = "epochs"
    workers: int = 0
    split: bool = True

    @property
    def world(self) -> int:
        return 1 if self.launch == "one" else 2

    def __str__(self) -> str:
        return "-".join(map(str, self))


VALUES: dict[str, Sequence[Any]] = {
    "launch": ("one", "auto", "ddp", "ddp_spawn", "ddp_notebook"),
    "model": ("recipe", "contrastive", "gradcache", "subclass", "module"),
    "data": ("samples", "mixture", "shards", "stream", "saved", "emoji", "loader", "own", "handed"),
    "accumulate": (1, 2),
    "loggers": (0, 2),
    "length": ("epochs", "steps", "limit"),
    "workers": (0, 1),
    "split": (True, False),
}


def cases(count: int = 60, seed: int = 0) -> list[Case]:
    """Combinations that have every pair of values, as few as a greedy choice finds, then random ones."""
    draw, names = random.Random(seed), list(VALUES)
    some = list(dict.fromkeys(Case(*(draw.choice(VALUES[name]) for name in names)) for _ in range(4000)))
    some = [case for case in some if case.model != "module" or case.data not in ("loader", "own")]  # none of ours
    some = [case for case in some if case.data != "emoji" or not case.workers]  # of nine sets each would have its own
    some = [case for case in some if refusal(case) is None or draw.random() < 0.2]
    left = {pair for case in some for pair in itertools.combinations(enumerate(case), 2)}
    found: list[Case] = []
    while len(found) < count:
        best = max(some, key=lambda case: len(left & set(itertools.combinations(enumerate(case), 2))))
        if not left:
            best = draw.choice(some)
        left -= set(itertools.combinations(enumerate(best), 2))
        some.remove(best)
        found.append(best)
    return found


def refusal(case: Case) -> str | None:
    """What the one line says; None for a combination that trains."""
    own = case.data in ("loader", "own")
    if case.accumulate > 1 and case.model in ("contrastive", "gradcache", "subclass"):
        return "contrasts samples of one batch"
    if case.data == "handed" and case.world > 1:
        return "this loader knows no trainer"
    if own and case.world > 1 and not case.split:
        return "ranks read the same samples"
    if case.accumulate > 1 and (own or case.data == "handed") and case.model != "module":
        return "counts of the whole step"
    return None


# what is trained -----------------------------------------------------------------------------------------------


class MomentTower(Tower):
    """Four moments of anything, through a layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width, self.layer = width, nn.Linear(4, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        x = x.nan_to_num().to(self.layer.weight.dtype).flatten(1)
        moments = torch.stack([x.mean(1), x.std(1), x.amin(1), x.amax(1)], dim=1)
        return Tokens(self.layer(moments.tanh())[:, None], torch.ones(len(x), 1, dtype=torch.bool))


def towers() -> Towers:
    return Towers(others={m: MomentTower() for m in ("image", "text")})


class Agree(Recipe):
    """Two towers that should agree: no term contrasts samples."""

    def __init__(self) -> None:
        super().__init__(optimizer=torch.optim.SGD)
        self.towers = towers()

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return {m: tower(batch.inputs[m]).h_BTD[:, 0] for m, tower in self.towers.items()}

    def forward(self, batch: Batch) -> Output:
        z = self.embed(batch)
        value_B = (z["image"] - z["text"]).square().mean(1)
        return Output({"agree": Term(value_B, valid=batch.both("image", "text"), given=("image", "text"))})


class Wider(Contrastive):
    """A recipe of the suite with one more term."""

    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        size_B = batch.index.float() * 0 + self.towers["image"](batch.inputs["image"]).h_BTD[:, 0].square().mean(1)
        output.terms["size"] = Term(size_B, valid=batch.present["image"], given=("image",))
        return output


class Plain(L.LightningModule):
    """A module of the caller's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x_B1 = batch.inputs["image"].nan_to_num().to(self.layer.weight.dtype).flatten(1)[:, :1]
        return self.layer(x_B1).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def model(name: str) -> L.LightningModule:
    torch.manual_seed(0)
    if name in ("contrastive", "gradcache", "subclass"):
        made = Wider if name == "subclass" else Contrastive
        return made(towers(), width=4, chunks=1 + (name == "gradcache"))
    return Agree() if name == "recipe" else Plain()


# what it is trained on -----------------------------------------------------------------------------------------


def images(folder: Path, count: int = 3, size: int = 12) -> list[str]:
    """Shards of images with texts."""
    paths = []
    for k in range(count):
        members = [(f"{i}.{e}", d) for i in range(size) for e, d in (("png", noise(k, i)), ("txt", b"%d %d" % (k, i)))]
        path = folder / f"{k}.tar"
        paths.append(str(path if path.exists() else write_tar(path, members)))
    return paths


def saved(folder: Path) -> Path:
    """A folder that ``datasets`` wrote."""
    import datasets

    if not folder.exists():
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {
            "image": [{"bytes": noise(9, i), "path": None} for i in range(33)],
            "text": [f"a {i}" for i in range(33)],
        }
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


class Rows(torch.utils.data.Dataset[int]):
    """Samples one by one, as the caller's own data set has them."""

    def __init__(self, count: int = OWN) -> None:
        self.samples: BatchDataset = Samples(count, ("image", "text"))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        return index

    def batch(self, at: list[int]) -> Batch:
        index_B = torch.tensor(at)
        rows = self.samples.rows(index_B.numpy(), index_B.numpy())
        return Batch(rows.inputs, self.samples.present(index_B.numpy()), index=index_B)


class OwnData(L.LightningDataModule):
    """A data module of Lightning's kind alone."""

    def __init__(self, rows: int, workers: int) -> None:
        super().__init__()
        self.rows, self.workers = rows, workers

    def loader(self, shuffle: bool = False) -> DataLoader[Any]:
        rows = Rows()
        options: dict[str, Any] = {"collate_fn": rows.batch, "shuffle": shuffle, "num_workers": self.workers}
        return DataLoader(rows, batch_size=self.rows, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(shuffle=True)

    val_dataloader = test_dataloader = predict_dataloader = loader


class Parts(SampleData):
    """Samples whose number no batch divides; the validation set is smaller."""

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Samples(21, self.names)}


def data(case: Case, folder: Path) -> L.LightningDataModule:
    folder.mkdir(parents=True, exist_ok=True)
    both = ("image", "text")
    if case.data in ("samples", "handed"):
        made: DataModule = Parts(45, B, both)
    elif case.data == "mixture":
        made = Mixture({"a": Parts(13, B, both), "b": Parts(30, B, both)}, batch_size=B)
    elif case.data == "emoji":
        made = Emoji(tiny=True, size=16, batch_size=B)
    elif case.data in ("loader", "own"):
        return OwnData(B // case.world, case.workers)
    else:
        fields = Fields(image=ImageField(field="png", size=6), text=TextField("txt"))
        more: dict[str, Any] = {"fields": fields, "batch_size": B, "holdout": 0.2}
        if case.data == "stream":
            urls = images(folder, 4, 10)
            more |= {"stream": Stream(urls, samples=40, buffer=5), "holdout": 0.0}
        elif case.data == "saved":
            more |= {"path": str(saved(folder / "saved")), "fields": Fields(image=ImageField(size=6), text=TextField())}
        else:
            images(folder)
            more["path"] = str(folder / "*.tar")
        made = UserData(**more)
    made.num_workers = case.workers
    made.eval_batch_size = 4
    if isinstance(made, Mixture):
        made._workers = case.workers
    return made


# one run -------------------------------------------------------------------------------------------------------


def ids_of(batch: Batch) -> list[int]:
    """Of the samples of a batch; none of its padding."""
    ids: list[int] = batch.index[torch.stack(list(batch.present.values())).any(0)].tolist()
    return ids


class Record(L.Callback):
    """Writes what each rank reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _write(self, trainer: L.Trainer, stage: str, number: int, batch: Batch) -> None:
        if not trainer.sanity_checking:
            with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
                print(json.dumps([stage, trainer.current_epoch, number, ids_of(batch), trainer.world_size]), file=file)

    def on_train_batch_start(self, trainer: L.Trainer, model: Any, batch: Batch, batch_idx: int) -> None:
        self._write(trainer, "train", 0, batch)

    def on_validation_batch_start(
        self, trainer: Any, model: Any, batch: Batch, batch_idx: int, number: int = 0
    ) -> None:
        self._write(trainer, "val", number, batch)

    def on_test_batch_start(self, trainer: Any, model: Any, batch: Batch, batch_idx: int, number: int = 0) -> None:
        self._write(trainer, "test", number, batch)

    def on_predict_batch_start(self, trainer: Any, model: Any, batch: Batch, batch_idx: int, number: int = 0) -> None:
        self._write(trainer, "predict", number, batch)

    def on_train_end(self, trainer: L.Trainer, model: Any) -> None:
        (self.folder / f"{trainer.global_rank}.steps").write_text(str(trainer.global_step))


def run(case: Case, folder: Path) -> None:
    """Fit, test and predict, as the caller's own script would: with Lightning's defaults."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("DESCANT_CACHE", str(folder / "cache"))
    folder.mkdir(parents=True, exist_ok=True)
    recipe, module = model(case.model), data(case, folder.parent / "data")
    length = {"epochs": {"max_epochs": 2}, "steps": {"max_steps": 8}, "limit": {"max_epochs": 2}}[case.length]
    loggers = [CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="board")] if case.loggers else False
    trainer = L.Trainer(
        **length,  # type: ignore[arg-type]
        accelerator="cpu",
        devices=case.world,
        strategy="auto" if case.launch in ("one", "auto") else case.launch,
        accumulate_grad_batches=case.accumulate,
        limit_train_batches=2 if case.length == "limit" else None,
        use_distributed_sampler=case.split,
        logger=loggers,
        callbacks=[Record(folder)],
        default_root_dir=folder,
        precision="64-true",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    fit_alone = case.launch == "ddp_spawn"  # each spawned rank imports all anew at each call
    if case.data in ("loader", "handed"):
        made: Any = module
        trainer.fit(recipe, made.train_dataloader(), made.val_dataloader())
        if fit_alone:
            return
        trainer.test(recipe, made.test_dataloader(), verbose=False)
        trainer.predict(recipe, made.predict_dataloader(), return_predictions=False)
    else:
        trainer.fit(recipe, datamodule=module)
        if fit_alone:
            return
        trainer.test(recipe, datamodule=module, verbose=False)
        trainer.predict(recipe, datamodule=module, return_predictions=False)


def faults(case: Case, folder: Path) -> list[str]:
    """What differs from every sample once an epoch: of the records that the ranks left."""
    module: Any = data(case, folder.parent / "data")
    seen: dict[tuple[str, int, int], Counter[int]] = {}
    batches: Counter[tuple[str, int]] = Counter()
    ranks = sorted(folder.glob("*.jsonl"))
    found = [] if len(ranks) == case.world else [f"{len(ranks)} ranks read, not {case.world}"]
    for path in ranks:
        for line in path.read_text().splitlines():
            stage, epoch, number, ids, world = json.loads(line)
            seen.setdefault((stage, epoch if stage == "train" else 0, number), Counter()).update(ids)
            batches[stage, epoch] += 1
            found += [] if world == case.world else [f"{stage}: {world} ranks"]
    # what one process reads without a trainer
    train: list[Any] = [module.train_dataloader()]
    loaders = {"train": train, "val": module.val_dataloader(), "test": module.test_dataloader()}
    wanted: dict[str, list[Counter[int]]] = {}
    for stage, each in loaders.items():
        wanted[stage] = [
            Counter(i for batch in x for i in ids_of(batch)) for x in (each if isinstance(each, list) else [each])
        ]
    per_epoch = -(-wanted["train"][0].total() // B)
    ended = len({epoch for stage, epoch in batches if stage == "val"})
    for (stage, epoch, number), ids in sorted(seen.items()):
        of, times = wanted["test" if stage == "predict" else stage][number], ended if stage == "val" else 1
        partial = stage == "train" and (
            case.length == "limit" or (case.length == "steps" and (epoch + 1) * per_epoch > 8)
        )
        twice = [i for i, n in ids.items() if (n > of[i] if partial else n != times * of[i])]
        if twice or (not partial and len(ids) != len(of)):
            found.append(
                f"{stage} {epoch}/{number}: {len(ids)} of {len(of)} samples, {len(twice)} not once: {twice[:3]}"
            )
    stages = {stage for stage, *_ in seen} | ({"val"} if case.length == "steps" and per_epoch > 8 else set())
    expected = {"train", *(["val"] if any(wanted["val"]) else [])}
    if case.launch != "ddp_spawn":
        expected |= {"test", "predict"} if any(wanted["test"]) else set()
    found += [f"stages: {sorted(stages)}"] if stages != expected else []
    steps = {path.read_text() for path in folder.glob("*.steps")}
    want = {"epochs": 2 * per_epoch, "steps": 8, "limit": 2 * -(-2 // case.accumulate)}[case.length]
    return found + ([] if steps == {str(want)} else [f"{sorted(steps)} steps, not {want}"])


def judge(case: Case, folder: Path, error: str) -> tuple[bool, str]:
    """Whether a run went as it should, and what it did."""
    line = refusal(case)
    last = next((text for text in reversed(error.strip().splitlines()) if "Error: " in text), "")
    if line is not None:
        return line in last, f"refused: {last.partition('Error: ')[2][:90]}" if last else "not refused"
    if error:
        return False, f"failed: {last or error[-200:]}"
    found = faults(case, folder)
    return not found, "; ".join(found) or "every sample once an epoch"


def alone(rank: int, case: Case, place: Path) -> None:
    stand_alone()
    joined(rank, case, place)


def joined(rank: int, case: Case, place: Path) -> None:
    # workers are forked, as those of a script: a process of a fork server would start a server for them
    multiprocessing.set_start_method("fork", force=True)
    run(case, place)


def start(case: Case, place: Path) -> str:
    """Run a case in processes of its own and return what it wrote if it failed. `auto` is a script of its own."""
    if case.launch == "auto":
        command = [sys.executable, "-m", "tests.plain_trainers", str(place), json.dumps(list(case))]
        # Lightning would choose a port that the kernel may give to the rank that asks for it too early
        port = os.environ | {"MASTER_PORT": str(free_port())}
        done = subprocess.run(command, capture_output=True, text=True, env=port)
        return done.stderr if done.returncode else ""
    try:
        run_ranks(2 if case.launch == "ddp" else 1, joined if case.launch == "ddp" else alone, case, place)
    except ProcessRaisedException as error:
        return str(error)
    return ""


def main(folder: Path, chosen: Sequence[Case]) -> int:
    good = 0
    for number, case in enumerate(chosen):
        place, began = folder / f"{number:02d}", time.monotonic()
        error = start(case, place)
        fine, what = judge(case, place, error)
        good += fine
        print(
            f"{number:2d} {'ok   ' if fine else 'FAULT'} {time.monotonic() - began:5.1f} s  {case}: {what}", flush=True
        )
        if not fine:
            (place / "stderr").write_text(error)
    print(f"{good} of {len(chosen)} as they should be")
    return good != len(chosen)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        keep_groups()
        run(Case(*json.loads(sys.argv[2])), Path(sys.argv[1]))
    else:
        sys.exit(main(Path(sys.argv[1]), cases()))
