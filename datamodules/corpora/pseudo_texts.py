"""Pseudo captions of an earlier run as a source of text. Letters: R drawings of a corpus."""

from __future__ import annotations

from descant.datamodules.corpora.captions import CaptionSource, Drawings
from descant.datamodules.selection.selected import COLUMN
from descant.datamodules.selection.table_selection import newest_table
from descant.modules.selection.pseudo_captions import CAPTIONS


class PseudoTexts(CaptionSource):
    """Pseudo captions from the table of a run, which ``descant predict`` wrote with WritePseudoCaptions.

    The sham of a mixer gives each drawing the captions of another one. Source: UniPT (arXiv 2309.01420).

    Args:
        table: the table, or the folder of a run (or of all runs of a name), of which the newest table is read.
        number: which caption of an image to take, 0 for the first.
    """

    def __init__(self, table: str, number: int = 0) -> None:
        if number < 0:
            raise ValueError(f"number {number}: captions of an image count from 0")
        self.table, self.number = table, number

    def texts(self, drawings: Drawings) -> list[str]:
        from descant.datamodules.selection.score_table import read  # late: parquet takes long to import

        file, column = newest_table(self.table, CAPTIONS), f"caption.{self.number}"
        rows = read(file, [COLUMN, "name", column]).to_pydict()
        at, texts = {index: n for n, index in enumerate(rows[COLUMN])}, []
        for c, hand in zip(drawings.concept_R.tolist(), drawings.hand_R.tolist(), strict=True):
            n, name = at.get(c * len(drawings.hands) + hand), drawings.name_C[c]
            if n is None or rows["name"][n] != name:
                other = "no caption" if n is None else f"one of {rows['name'][n]!r}: ids of other data"
                raise ValueError(f"{file}: for {drawings.hands[hand]}'s {name!r} {other}; predict with this data")
            texts.append(rows[column][n])
        return texts if drawings.alt_R is None else [texts[r] for r in drawings.alt_R.tolist()]
