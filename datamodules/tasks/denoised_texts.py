"""Texts that denoisers corrupt, as dialogues: the corrupted text is the question, its missing part the answer.

Letters: B samples of a batch, N windows of a set, T tokens of one, S of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, NumberedDataset, Rows
from descant.datamodules.changes import Corpus, Property
from descant.datamodules.corpora.base import name_hash
from descant.datamodules.prepare.docstrings import library_texts
from descant.datamodules.tasks.dialogues import Dialogues
from descant.modules.core.rng import mix_N, uniform_N
from descant.modules.tokenizers.text import BOS, EOS, Tokenizer
from descant.modules.transforms.denoisers import (
    MODES,
    Denoised,
    Denoiser,
    MixtureOfDenoisers,
    SpanCorruption,
    Suffix,
    compact_rows,
    mode_number,
)

#: Number of sentinels, as in T5; and where the share of each split of the texts ends.
SENTINELS, SPLITS = 100, {"test": 0.1, "sealed": 0.2, "val": 0.3, "train": 1.0}


class DenoisedSet(NumberedDataset):
    """Windows of texts, each corrupted by a training denoiser drawn at each visit, or by some tasks in turn.

    Args:
        window_N3: first token of each window, and the first token and the end of its text.
        tasks: numbers of evaluation tasks. Each corrupts a window always alike, and only tokens of the text are
            predicted. Without any, a window moves by up to half its length at each visit.
        wrong: the mode token is one of the two others.
    """

    modalities = ("text",)

    def __init__(
        self, data: DenoisedTexts, window_N3: np.ndarray, tasks: Sequence[int] = (), wrong: bool = False
    ) -> None:
        super().__init__(data.seed, None if tasks else data.drop)
        self.data, self.wrong, self.judged = data, wrong, bool(tasks)
        self.window_N3, self.task_N = (
            np.repeat(window_N3, len(tasks) or 1, axis=0),
            np.tile(tasks or [-1], len(window_N3)),
        )
        self.id_N = self.window_N3[:, 0] * 16 + self.task_N + 1  # another one for each task

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        data, T, task_B = self.data, self.data.tokens, torch.from_numpy(self.task_N[index_B])
        first_B, begin_B, end_B = self.window_N3[index_B].T
        if self.judged:
            draw_B = mix_N(self.id_N[index_B], "denoised")
        else:
            move_B = ((uniform_N(draw_B, "window").numpy() - 0.5) * T).astype(np.int64)
            first_B = np.maximum(np.minimum(first_B + move_B, end_B - T), begin_B)
        length_B, place_T = torch.from_numpy(np.minimum(end_B - first_B, T)), torch.arange(T)
        ids_BT = data.ids_W[(torch.from_numpy(first_B)[:, None] + place_T).clamp(max=len(data.ids_W) - 1)]
        ids_BT = ids_BT.where(place_T < length_B[:, None], 0)
        mixture, first = data.judging if self.judged else data.denoisers, data.answer_token + 1 + len(MODES)
        out = mixture(ids_BT, length_B, draw_B, first, task_B if self.judged else None)
        mode_B = out.mode_B if data.mode is None else torch.full_like(out.mode_B, mode_number(data.mode))
        if self.wrong:
            mode_B = (mode_B + 1 + torch.from_numpy(mix_N(draw_B, "wrong") % 2)) % len(MODES)
        text_BS, loss_mask_BS = data.assemble(out, mode_B, words_alone=self.judged)
        key_B = torch.from_numpy(self.window_N3[index_B, 0])
        return Rows({"text": text_BS, "loss_mask": loss_mask_BS}, {"denoiser": out.denoiser_B}, key_B)


class DenoisedTexts(Dialogues):
    """Windows of long texts, corrupted by denoisers: ``<bos> [mode] input <answer> target <eos>`` (UL2).

    Texts are the language reference and the docstrings of the Python that runs, so that nothing is downloaded, or those
    of a folder. By a hash of their names, a tenth of the texts each is for the test, a lock-box and validation.
    Modality ``text``; training predicts all tokens of a target. Evaluation sets have whole windows, each corrupted by
    all ``tasks`` in turn, and predict only tokens of the text, so that models of other denoisers are compared on the
    same tokens: "validate" has ``val``; "test" has ``texts``, ``wrong`` (other mode tokens) and each task by its name.

    Args:
        tokens: T. Rows are longer: ``length`` of the data is that of the longest.
        denoisers: denoisers of training; UL2's mixture by default.
        tasks: name -> denoiser of evaluation; by default ``infill`` (3, .15), ``suffix`` (a quarter) and ``gap`` (64,
            .5), spans anywhere in a text.
        mode: the mode token of all rows, R, S or X; by default that of each denoiser.
        folder: folder of .txt files, one text each, instead of Python's.
        held_out: the most windows of an evaluation set, before they are repeated for each denoiser.
        text: the tokenizer; bytes by default.
        sealed: use the evaluation sets of the lock-box.
        kwargs: arguments of every data module.

    >>> last = MixtureOfDenoisers([Suffix(0.25, uniform=False)])
    >>> data = DenoisedTexts(tokens=80, denoisers=last, tiny=True, batch_size=4)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.inputs["text"].shape[1] == data.length, batch.inputs["loss_mask"].sum(dim=1).tolist()  # 20 and <eos>
    (True, [21, 21, 21, 21])
    """

    modalities = ("text",)

    def __init__(
        self,
        tokens: int = 128,
        denoisers: MixtureOfDenoisers | None = None,
        tasks: dict[str, Denoiser] | None = None,
        mode: str | None = None,
        folder: str | None = None,
        held_out: int = 256,
        text: Tokenizer | None = None,
        sealed: bool = False,
        **kwargs: Any,
    ) -> None:
        self.denoisers = denoisers or MixtureOfDenoisers()
        self.tasks: Mapping[str, Denoiser] = tasks or {
            "infill": SpanCorruption(3, 0.15, free=True),
            "suffix": Suffix(0.25, uniform=False),
            "gap": SpanCorruption(64, 0.5, free=True),
        }
        self.judging = MixtureOfDenoisers(list(self.tasks.values()))
        spans = max(self.denoisers.spans(tokens), self.judging.spans(tokens))
        if spans > SENTINELS:
            raise ValueError(f"tokens {tokens}: {spans} spans of a text, and {SENTINELS} sentinels; fewer tokens")
        super().__init__(length=tokens + 2 * spans + 4, **kwargs)
        if mode is not None:
            mode_number(mode)
        if held_out < 1:
            raise ValueError(f"held_out {held_out}: 1 is the least")
        self.tokens, self.mode, self.held_out, self.text, self.sealed = tokens, mode, held_out, text, sealed
        self.texts_in = folder

    @property
    def embedded_ids(self) -> int:
        """Return the number of ids that a model embeds: of the tokenizer, image and answer, modes and sentinels."""
        return self.answer_token + 1 + len(MODES) + SENTINELS

    # the texts ------------------------------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> dict[str, str]:
        if self.tiny:
            return {f"{n}": "".join(f"{n} and {k} are {n + k}. " for k in range(self.tokens // 4)) for n in range(64)}
        if self.texts_in is None:
            return library_texts()
        root = Path(self.texts_in)
        files = sorted(root.rglob("*.txt"))
        return {str(file.relative_to(root)): file.read_text(encoding="utf-8", errors="replace") for file in files}

    def corpora(self) -> dict[str, Corpus]:
        if self.tiny:
            return {}
        names, none_M = list(self.texts), np.array([], dtype=np.int64)
        content = {"samples": names, "texts": list(self.texts.values())}
        parts = {part: Property(values, names.__getitem__) for part, values in content.items()}
        return {"texts": Corpus(self.texts_in or "Python's library", parts, [], none_M, none_M)}

    @cached_property
    def _read(self) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Return ids of all texts, windows ``[N, 3]``, and the number from [0, 1) that chooses the split of each."""
        ids, windows, splits, begin = list[Tensor](), list[np.ndarray](), list[np.ndarray](), 0
        for name, text in self.texts.items():
            ids.append(torch.tensor(self.tokenizer.encode(text), dtype=torch.long))
            if len(ids[-1]) > 1:
                end = begin + len(ids[-1])
                first_N = np.minimum(np.arange(begin, end, self.tokens), max(begin, end - self.tokens))
                windows.append(np.stack([first_N, np.full_like(first_N, begin), np.full_like(first_N, end)], axis=1))
                alike = name.lstrip("_").removeprefix("py")  # two forms of a module have the same docstrings
                u = uniform_N(np.array([name_hash(alike)], dtype=np.uint64), "denoised/split").numpy()
                splits.append(np.repeat(u, len(first_N)))
            begin += len(ids[-1])
        if not windows:
            raise ValueError(f"folder {self.texts_in or 'not given'}: no text (*.txt); such as the folder of a book")
        return torch.cat(ids), np.concatenate(windows), np.concatenate(splits)

    @property
    def ids_W(self) -> Tensor:
        return self._read[0]

    def windows(self, split: str, whole: bool = False) -> np.ndarray:
        """Return the windows of a split, ``[N, 3]``; for evaluation only whole ones, some of them, evenly spaced."""
        _, window_N3, u_N = self._read
        low = max((end for end in SPLITS.values() if end < SPLITS[split]), default=0.0)
        window_N3 = window_N3[(u_N >= low) & (u_N < SPLITS[split])]
        if whole:
            window_N3 = window_N3[window_N3[:, 2] - window_N3[:, 1] >= self.tokens]
            window_N3 = window_N3[:: -(-len(window_N3) // self.held_out) or 1]
        if not len(window_N3):
            raise ValueError(
                f"tokens {self.tokens}: no text of the split {split} is as long; fewer tokens, or more texts"
            )
        return window_N3

    def assemble(self, out: Denoised, mode_B: Tensor, words_alone: bool) -> tuple[Tensor, Tensor]:
        """Return ``text_BS`` and ``loss_mask_BS``: tokens of the target, or only those of the text among them."""
        B, one_B1 = len(mode_B), torch.ones(len(mode_B), 1, dtype=torch.long)
        parts = [BOS * one_B1, self.answer_token + 1 + mode_B[:, None], out.input_BT]
        parts += [self.answer_token * one_B1, out.target_BU, EOS * one_B1]
        real = [one_B1, one_B1, out.real_BT, one_B1, out.real_BU, one_B1]
        asked = torch.zeros(B, out.input_BT.shape[1] + 3, dtype=torch.bool), out.text_BU if words_alone else out.real_BU
        loss_mask = torch.cat([*asked, one_B1 * (not words_alone)], dim=1).bool()
        _, text_BS, loss_mask_BS = compact_rows(torch.cat(real, dim=1).bool(), torch.cat(parts, dim=1), loss_mask)
        return text_BS[:, : self.length], loss_mask_BS[:, : self.length]

    # the sets -------------------------------------------------------------------------------------------------------

    def training_set(self) -> DenoisedSet:
        return DenoisedSet(self, self.windows("train"))

    def bank_set(self) -> DenoisedSet:
        return DenoisedSet(self, self.windows("train", whole=True), range(len(self.tasks)))

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        every = range(len(self.tasks))
        if stage == "validate":
            return {"val": DenoisedSet(self, self.windows("val", whole=True), every)}
        window_N3 = self.windows("sealed" if self.sealed else "test", whole=True)
        sets: dict[str, BatchDataset] = {t: DenoisedSet(self, window_N3, [n]) for n, t in enumerate(self.tasks)}
        sets["texts"] = DenoisedSet(self, window_N3, every)
        return {**sets, "wrong": DenoisedSet(self, window_N3, every, wrong=True)}
