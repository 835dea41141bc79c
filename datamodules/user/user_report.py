"""Messages on user data: rows read and left out, losses, truncated captions; each printed once, by rank 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from descant.datamodules.fields.fields import TextField
from descant.datamodules.sources.base import text_of
from descant.datamodules.sources.joined import Joined
from descant.datamodules.sources.reading import UserDataset
from descant.modules.core.errors import warn

if TYPE_CHECKING:
    from descant.datamodules.user.user_data import UserData

#: How many captions are tokenized to estimate the share of truncated ones, and from which share on it is reported.
_SAMPLE, _TRUNCATED = 500, 0.02


class DataReport:
    """The messages of one :class:`UserData`."""

    def __init__(self, data: UserData) -> None:
        self.data = data
        self.started = False
        self.lost = 0  # losses known from the indices
        self.unread = 0  # unreadable samples that were reported

    def start(self, training: UserDataset) -> None:
        """Report, before training, the rows, truncated captions and known losses, once."""
        if self.started:
            return
        self.started = True
        first = not self.data._world()[0]
        if first and not self.data.tiny:
            self._rows()
        if first:
            self._report_truncation(training)
            self._unseen_classes()
            self._losses()

    def drawn_faults(self, rows: int = 32) -> list[str]:
        """Read some samples of each set, evenly spaced, and describe those that cannot be read: one line per set."""
        lines = []
        for split, (name, row_N) in self.data.splits.items():
            reader = self.data.readers[name]
            for m in self.data.fields:
                has_N = row_N[reader.present[m][row_N]]
                row_B = has_N[np.linspace(0, len(has_N) - 1, min(rows, len(has_N))).round().astype(int)]
                faults = list(reader.read(row_B, None).faults([m]).values()) if len(row_B) else []
                line = f"{len(faults)} of {len(row_B)} drawn samples of {split} cannot be read"
                lines += [f"{line}: {faults[0][0]}: {faults[0][1]}"] if faults else []
                if faults and len(faults) == len(row_B) and split == "train":
                    raise ValueError(f"{faults[0][0]}: {faults[0][1]}; so are all {len(row_B)} drawn samples with {m}")
        return lines

    def _unseen_classes(self) -> None:
        """Warn of classes that validation or test has and training lacks."""
        data = self.data
        if data.tiny or "train" not in data.splits:
            return
        seen = {target: self._count_classes(target, "train") for target in data.classes}
        for target, count_C in seen.items():
            for split in (split for split in data.splits if split != "train"):
                unseen_C = np.where(count_C > 0, 0, self._count_classes(target, split))
                if unseen_C.any():
                    name, rows = data.classes[target][int(unseen_C.argmax())], int(unseen_C.max())
                    many = f"{int((unseen_C > 0).sum()):,} classes of {target} are in {split} and not in train"
                    warn(f"{many}, such as {name!r} ({rows:,} samples): they cannot be predicted")

    def _count_classes(self, target: str, split: str) -> np.ndarray:
        """Count the samples of each class in a split."""
        name, row_N = self.data.splits[split]
        label_N = self.data.target_values[target][name][row_N]
        return np.bincount(label_N[label_N >= 0], minlength=len(self.data.classes[target]))

    def _rows(self) -> None:
        data = self.data
        sources = data.sources.values()
        merged, lost = sum(s.merged for s in sources), sum(len(s.faults) for s in sources)
        present = {split: self._present(*rows) for split, rows in data.splits.items()}
        out = [f"{lost:,} left out"] if lost else []
        out += [f"{merged:,} merged with another row of the same file"] if merged else []
        empty = sum(len(row_N) for _, row_N in data.splits.values()) - sum(map(len, present.values()))
        out += [f"{empty:,} samples without {' or '.join(data.modalities)} left out"] if empty else []
        for k, m in enumerate(data.modalities):
            without = sum(int((~has_NM[:, k]).sum()) for has_NM in present.values())
            out += [f"{without:,} without {m}"] if without else []
        for joined in (source for source in sources if isinstance(source, Joined) and source.unmatched):
            out += [f"{joined.unmatched:,} rows of {joined.path} without a sample of that name ({joined.key}) left out"]
        absent = sum(s.absent for s in sources)
        out += [f"{absent:,} files named but missing"] if absent else []
        unread = {name: what for source in sources for name, what in source.unread.items()}
        out += [f"column {name} not read ({what})" for name, what in list(unread.items())[:5]]
        read = sum(map(len, sources)) + merged + lost
        samples = ", ".join(f"{split} {len(has_NM):,}" for split, has_NM in present.items())
        line = "; ".join([f"{read:,} rows read", *out, f"samples: {samples}"])
        where = f"; unreadable samples are listed in {data.ledger.path}" if data.ledger.path is not None else ""
        print(f"descant: data: {line}{where}", flush=True)

    def _present(self, name: str, row_N: np.ndarray) -> np.ndarray:
        """Return bool ``[N, M]``: the modalities of those rows that have any."""
        present = self.data.readers[name].present
        has_NM = np.stack([present[m][row_N] for m in self.data.modalities], axis=1)
        return np.asarray(has_NM[has_NM.any(axis=1)])

    def _report_truncation(self, training: UserDataset) -> None:
        text = self.data.fields.get("text")
        if not isinstance(text, TextField) or self.data.tiny:
            return
        rows = training.row_N[training.has["text"]]
        column, source = training.reader.columns["text"], training.reader.source
        truncated = []
        for row in rows[:: max(1, len(rows) // _SAMPLE)].tolist():
            name = column.names[int(column.has_NF[row].argmax())]
            try:
                truncated.append(text.count_truncated([text_of(source.read(row, [name])[name])]))
            except (OSError, ValueError, KeyError):
                continue
        share = sum(truncated) / max(len(truncated), 1)
        if share > _TRUNCATED:
            line = f"{share:.0%} of the captions are longer than {text.tokenizer.length} tokens and are truncated"
            warn(f"{line}: data.fields.text.tokenizer.length")

    def _losses(self) -> None:
        data = self.data
        faults = [fault for source in data.sources.values() for fault in source.faults]
        if not faults:
            return
        self.lost = len(faults)
        for fault in faults:
            data.ledger.lose(*fault)
        first = f"{faults[0].file}: {faults[0].why}" if faults[0].file else faults[0].why
        warn(f"{first} ({len(faults):,} in all: {data.ledger.path or 'the ledger'})")

    def epoch_end(self) -> None:
        """Report how many samples could not be read, if these are more than reported before."""
        notes = self.data.ledger.read_lines()
        count = len({(note["file"], note["sample"]) for note in notes}) - self.lost
        if count <= self.unread:
            return
        self.unread = count
        which = f"{count:,} samples could not be read, the last" if count > 1 else "1 sample could not be read:"
        last = f"{notes[-1]['sample']}: {notes[-1]['why']}"
        warn(f"data: {which} {last}; all of them: {self.data.ledger.path}")
