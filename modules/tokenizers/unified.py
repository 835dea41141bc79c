"""One vocabulary for text and for the codes of other modalities, with the rules of which id may follow which.

    0 ... text - 1 | marks of dialogues | begin, codes of layer 0, codes of layer 1, ..., end | begin, codes, end | ...

Source: MIO (arXiv 2409.17692), with ids of text, of image codes and of speech codes. The codes of a sample are between
two marks, layer by layer in blocks of equal length. Letters: B rows, T codes of a sample, S = T + 2 with its marks, R
generated rows, N tokens of one so far, V ids, Z states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descant.modules.core.errors import no_such
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.modules.tokenizers.text import EOS, SPECIAL

TEXT = "text"


@dataclass(frozen=True)
class CodeFormat:
    """Shape of a modality's codes, and the digest of the tokenizer that makes them.

    >>> CodeFormat((4, 4), codes=256, layers=2).length
    32
    """

    grid: tuple[int, ...]
    codes: int
    layers: int = 1
    digest: str = ""

    @classmethod
    def of(cls, tokenizer: CodeTokenizer) -> CodeFormat:
        return cls(tokenizer.grid, tokenizer.codes, tokenizer.layers, tokenizer.digest())

    @property
    def sizes(self) -> tuple[tuple[int, ...], int, int]:
        return self.grid, self.codes, self.layers

    @property
    def length(self) -> int:
        """Return the number of ids of a sample."""
        return self.layers * math.prod(self.grid)

    @property
    def first_T(self) -> Tensor:
        """Return the first code that each place may have: that of its layer."""
        return self.codes * torch.arange(self.layers).repeat_interleave(math.prod(self.grid))


class UnifiedVocabulary:
    """Disjoint ranges of ids of one language model: text, and for each modality a begin, all codes and an end.

        id(m, layer l, code c) = first_m + 1 + l K_m + c,   first_m and first_m + 1 + L_m K_m: its begin and its end

    Args:
        text: number of ids of the text tokenizer. formats: modality -> format of its codes, in the order of ids.
        marks: number of ids between these, such as those of an image and of an answer in dialogues.

    >>> vocabulary = UnifiedVocabulary(264, {"image": CodeFormat((2,), 8), "audio": CodeFormat((2,), 4, layers=2)})
    >>> vocabulary.size, vocabulary.range("image"), vocabulary.range("audio")
    (286, range(267, 275), range(277, 285))
    >>> vocabulary.wrap("audio", torch.tensor([[0, 3, 4, 7]])).tolist()
    [[276, 277, 280, 281, 284, 285]]
    """

    def __init__(self, text: int, formats: Mapping[str, CodeFormat], marks: int = 2) -> None:
        if TEXT in formats or not formats:
            has = "text, which has no codes" if formats else "none"
            raise ValueError(f"formats: {has}; such as those of image")
        self.text, self.formats, self.begins, self.size = text, dict(formats), dict[str, int](), text + marks
        for modality, format in self.formats.items():
            self.begins[modality] = self.size
            self.size += format.layers * format.codes + 2
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}

    def range(self, modality: str) -> range:
        """Return the ids of a modality, without its begin and end. Raise ValueError for an unknown one."""
        if modality == TEXT:
            return range(self.text)
        if modality not in self.formats:
            raise ValueError(f"modality {modality!r}: {no_such(modality, [TEXT, *self.formats])}")
        format = self.formats[modality]
        return range(self.begins[modality] + 1, self.begins[modality] + 1 + format.layers * format.codes)

    def kind(self, token: int) -> str:
        """Describe an id in words."""
        for modality in (TEXT, *self.formats):
            ids = self.range(modality)
            if token in ids:
                return modality
            if modality != TEXT and token in (ids.start - 1, ids.stop):
                return f"the {'end' if token == ids.stop else 'begin'} of {modality}"
        return "a mark" if self.text <= token < self.size else f"outside every range of the {self.size} ids"

    def wrap(self, modality: str, code_BT: Tensor) -> Tensor:
        """Convert codes of samples, from 0, to ids between begin and end: ``[B, T] -> [B, S]``."""
        ids = self.range(modality)
        ends_B1 = (code_BT.new_full((len(code_BT), 1), i) for i in (ids.start - 1, ids.stop))
        id_BS = torch.cat([next(ends_B1), code_BT + ids.start, next(ends_B1)], dim=1)
        self.unwrap(modality, id_BS)
        return id_BS

    def unwrap(self, modality: str, id_BS: Tensor) -> Tensor:
        """Convert ids between begin and end to codes: the inverse of ``wrap``."""
        ids, format, host_BS = self.range(modality), self.formats[modality], id_BS.cpu()
        least_S = torch.cat([torch.tensor([-1]), format.first_T, torch.tensor([len(ids)])]) + ids.start
        most_S = least_S + (format.codes - 1)
        most_S[[0, -1]] = least_S[[0, -1]]
        if id_BS.shape[1] != len(least_S):
            raise ValueError(f"{modality}: {id_BS.shape[1]} ids of a sample, and {len(least_S)} are expected")
        for b, s in ((host_BS < least_S) | (host_BS > most_S)).nonzero()[:1].tolist():
            token, least, most = int(host_BS[b, s]), int(least_S[s]), int(most_S[s])
            raise ValueError(
                f"{modality} [{b}, {s}]: id {token} is {self.kind(token)}, where {least} to {most} are expected"
            )
        return id_BS[:, 1:-1] - ids.start

    def parse(self, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Split an answer into its parts, text ids and codes of whole samples, in order; parsing ends at ``<eos>``.

        >>> UnifiedVocabulary(9, {"image": CodeFormat((2,), 4)}).parse([8, 11, 12, 15, 16, 2])
        [('text', [8]), ('image', [0, 3])]
        """
        parts, at, begin = list[tuple[str, list[int]]](), 0, {first: m for m, first in self.begins.items()}
        while at < len(tokens) and tokens[at] != EOS:
            if (modality := begin.get(tokens[at])) is not None:
                whole = tokens[at : at + self.formats[modality].length + 2]
                parts.append((modality, self.unwrap(modality, torch.tensor([list(whole)]))[0].tolist()))
                at += len(whole)
                continue
            if tokens[at] not in self.range(TEXT):
                raise ValueError(f"token {at}: id {tokens[at]} is {self.kind(tokens[at])}, where a part begins")
            if not parts or parts[-1][0] != TEXT:
                parts.append((TEXT, []))
            parts[-1][1].append(tokens[at])
            at += 1
        return parts

    def allowed_ids(self, token_RN: Tensor, left: int, only: Sequence[str] | None = None) -> Tensor:
        """Return which ids may follow, bool ``[R, V]``, so that rows still parse. ``only``: modalities of their parts.

        Inside a block come its codes, layer by layer, and then its end. A block begins only if all of it fits into the
        ``left`` tokens. Outside of blocks come words, begins and, after the first token, ``<eos>``. A row without any
        allowed id cannot be completed.
        """
        table_ZV, block_V, need_V, state_M, length_M = self._on(token_RN.device)
        R, N = token_RN.shape
        # the last begin of each row, and how many tokens have followed it
        block_RN = torch.cat([block_V.new_full((R, 1), -1), block_V[token_RN]], dim=1)
        place_RN = torch.arange(N + 1, device=token_RN.device).where(block_RN >= 0, 0)
        last_R = place_RN.max(dim=1).values
        since_R = N - last_R
        m_R = block_RN.gather(1, last_R[:, None])[:, 0].clamp(min=0)
        inside_R = (last_R > 0) & (since_R <= length_M[m_R])
        state_R = (state_M[m_R] + since_R).where(inside_R, 0)
        outside_V = torch.zeros_like(table_ZV[0])
        for modality in (TEXT, *self.formats) if only is None else only:
            ids = slice(SPECIAL, self.text) if modality == TEXT else slice(at := self.begins[modality], at + 1)
            outside_V[ids] = True
        outside_V[EOS] = N > 0
        outside_V &= need_V <= left
        fits_R = ~inside_R | (length_M[m_R] - since_R < left)
        return torch.where(inside_R[:, None], table_ZV[state_R], outside_V) & fits_R[:, None]

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tables of :meth:`allowed_ids` on a device.

        They are the ids that each state allows ``[Z, V]``; for each id, the modality that it begins, or -1, and how
        many tokens it needs; for each modality, its first state and its length.
        """
        if device not in self._tables:
            states = [1]  # state 0 is outside; inside, there is one for each number of tokens after the begin
            for format in self.formats.values():
                states.append(states[-1] + format.length + 1)
            table_ZV = torch.zeros(states[-1], self.size, dtype=torch.bool)
            block_V, need_V = torch.full((self.size,), -1), torch.ones(self.size, dtype=torch.long)
            for m, (modality, format) in enumerate(self.formats.items()):
                ids, begin = self.range(modality), self.begins[modality]
                block_V[begin], need_V[begin] = m, format.length + 2
                for t, first in enumerate(format.first_T.tolist()):
                    table_ZV[states[m] + t, ids.start + first : ids.start + first + format.codes] = True
                table_ZV[states[m] + format.length, ids.stop] = True
            length_M = torch.tensor([format.length for format in self.formats.values()], dtype=torch.long)
            made = table_ZV, block_V, need_V, torch.tensor(states[:-1], dtype=torch.long), length_M
            self._tables[device] = tuple(x.to(device) for x in made)
        return self._tables[device]
