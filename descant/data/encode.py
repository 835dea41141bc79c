"""``descant data encode``: write the codes of a data set's samples to a parquet file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from descant.cli.errors import fail
from descant.data.configured import datamodule
from descant.datamodules.selection.code_table import PADDING, CodeTable


def encode(configs: Sequence[str], options: Sequence[tuple[str, str]], trust: Sequence[str], out: Path) -> str:
    """Write the codes. Returns lines that describe them."""
    if out.exists():
        fail(f"--out {out}: it is there already, and nothing is overwritten")
    data = datamodule(configs, options, trust)
    table = getattr(data, "table", None)
    if not isinstance(table, CodeTable):
        fail(f"--config {configs[0]}: {type(data).__name__} has no codes; EmojiCodes has")
    table.write(out)
    lines = [
        f"{out}: {len(table.index_N):,} samples, {', '.join(f'{n:,} {s}' for s, n in Counter(table.set_N).items())}"
    ]
    for modality, format in table.formats.items():
        used = table.codes[modality][table.codes[modality] != PADDING].unique().numel()
        lines.append(
            f"  {modality}: {format.length} codes in {format.layers} layers of {format.codes}, "
            f"{used} in use, tokenizer {format.digest[:8]}"
        )
    return "\n".join(lines)
