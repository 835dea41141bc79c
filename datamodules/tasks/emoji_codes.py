"""Names, drawings and spoken names of emoji as codes, in documents of one vocabulary, each predicted from any others.

Letters: B samples of a batch, N rows of a table, R rows of a set, S ids of a block with its marks, T codes of a sample.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, NumberedDataset, Rows
from descant.datamodules.changes import Corpus, Property
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_pack import VENDORS
from descant.datamodules.corpora.emoji_set import EmojiSet, Row
from descant.datamodules.corpora.spoken import SpokenNames
from descant.datamodules.selection.code_table import PADDING, CodeTable, read_codes, require_same
from descant.datamodules.tasks.dialogues import Dialogues
from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.rng import mix_N, uniform_N
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.modules.tokenizers.text import BOS, EOS, ByteTokenizer, Tokenizer
from descant.modules.tokenizers.unified import TEXT, CodeFormat, UnifiedVocabulary

#: Tables encoded in this process, while a data module holds them: the stages of a run share them.
_ENCODED: weakref.WeakValueDictionary[tuple[Any, ...], CodeTable] = weakref.WeakValueDictionary()
#: How many samples are encoded at once.
CHUNK = 256


class CodeDocument:
    """Modalities of a document in their order, the last one after the mark of an answer.

    Args:
        order: at least two, each once, such as [image, text]: a drawing, then its name.
        weight: weight of such documents in a mixture, 0 or more.
        whole: learn all tokens, as in pre-training; otherwise only those of the last modality.

    >>> CodeDocument(["image"])
    Traceback (most recent call last):
    ValueError: order: image: at least two modalities, each once, such as [image, text]
    """

    def __init__(self, order: list[str], weight: float = 1.0, whole: bool = True) -> None:
        if len(order) < 2 or len(set(order)) < len(order):
            raise ValueError(f"order: {', '.join(order)}: at least two modalities, each once, such as [image, text]")
        require_value(weight >= 0, f"weight {weight:g}: 0 or more")
        self.order, self.weight, self.whole = tuple(order), weight, whole


class CodeDocuments(NumberedDataset):
    """Samples as documents: from the data's mixture in training, otherwise from each of some directions in turn.

    Args:
        rows_R: rows of the data's table. directions: (source, target) of evaluation, where only content is predicted,
            no marks and no padding. other: take the source from another concept.
    """

    modalities = (TEXT,)

    def __init__(
        self, data: EmojiCodes, rows_R: np.ndarray, directions: Sequence[tuple[str, str]] = (), other: bool = False
    ) -> None:
        super().__init__(data.seed, None if directions else data.drop)
        self.data, self.judged = data, bool(directions)
        self.documents = [CodeDocument([*pair]) for pair in directions] or data.documents
        number = [data.directions.index(pair) for pair in directions] or [0]
        source_R, key_N = rows_R, data.table.key_N
        for shift in range(len(rows_R) // 2, len(rows_R)) if other else ():
            source_R = np.roll(rows_R, shift)
            if (key_N[source_R] != key_N[rows_R]).all():
                break
        self.row_N, self.source_N = (np.repeat(x_R, len(number)) for x_R in (rows_R, source_R))
        self.document_N = np.tile(np.arange(len(number)), len(rows_R))
        self.id_N = data.table.index_N[self.row_N] * 64 + np.tile(number, len(rows_R)) + 32 * other
        self.ends_D = np.cumsum([document.weight for document in self.documents])

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        document_B = self.document_N[index_B]
        if not self.judged:
            u_B = uniform_N(draw_B, "document").numpy() * self.ends_D[-1]
            document_B = np.searchsorted(self.ends_D, u_B, side="right").clip(max=len(self.ends_D) - 1)
        data, S = self.data, self.data.length
        ids_BS, mask_BS = torch.zeros(len(index_B), S, dtype=torch.long), torch.zeros(len(index_B), S, dtype=torch.bool)
        for b, (row, source, d) in enumerate(zip(self.row_N[index_B], self.source_N[index_B], document_B, strict=True)):
            document = self.documents[d]
            parts = [data.part(modality, source) for modality in document.order[:-1]]
            target, content = data.part(document.order[-1], row)
            front = [BOS, *itertools.chain(*(ids for ids, _ in parts)), data.answer_token]
            learned = [document.whole and not self.judged] * (len(front) - 2)
            ids = [*front, *target, EOS]
            mask = [False, *learned, False, *(content if self.judged else [True] * len(target))]
            mask.append(document.order[-1] == TEXT or not self.judged)
            ids_BS[b, : len(ids)], mask_BS[b, : len(ids)] = torch.tensor(ids), torch.tensor(mask)
        key_B = torch.from_numpy(data.table.key_N[self.row_N[index_B]])
        return Rows({"text": ids_BS, "loss_mask": mask_BS}, {"document": torch.from_numpy(document_B)}, key_B)


class EmojiCodes(Dialogues):
    """Emoji as documents of names, codes of drawings and codes of spoken names (MIO).

        <bos> part ... <answer> part <eos>,     part: bytes of the name, or begin, codes layer by layer, end

    The codes come from a file that ``descant data encode`` wrote, or are encoded once, before the first step, without
    augmentation; a training drawing has one of the voices. Modality ``text``; each document has its own tokens to
    learn. "validate" has ``val``; "test" has ``vendor`` (trained names by an unseen vendor and ``voice`` of the
    speech), ``concept`` (unseen names by vendors of training) and ``shuffled`` (as ``vendor``, with sources of other
    concepts). Each has all directions; ``val`` and ``vendor`` also have each alone, as ``vendor_text_from_image``.

    Args:
        documents: documents of training, by weight; by default all directions with equal weight, all tokens learned.
        tokenizers: modality, image or audio, -> its tokenizer; fitted on training samples if it needs that.
        codes: a file, instead of encoding; ``tokenizers``, if given too, must be those that made it.
        size: pixels of a drawing's side.
        speech: how names are spoken; its ``voice`` is that of evaluation.
        letters: the most tokens of a name. held_out: the most samples of an evaluation set, before they are repeated
            for each direction.
        text: the tokenizer of names; bytes by default.
        development, sealed, folder: as in Emoji.
        kwargs: arguments of every data module.
    """

    modalities = (TEXT,)

    def __init__(
        self,
        documents: list[CodeDocument] | None = None,
        tokenizers: dict[str, CodeTokenizer] | None = None,
        codes: str | None = None,
        size: int = 48,
        speech: SpokenNames | None = None,
        letters: int = 32,
        held_out: int = 200,
        text: Tokenizer | None = None,
        development: bool = False,
        sealed: bool = False,
        folder: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokenizers, self.file = tokenizers or {}, None if codes is None else Path(codes)
        self.speech, self.size, self.folder_of, self.text = speech or SpokenNames(), size, folder, text
        self.letters, self.held_out, self.development, self.sealed = letters, held_out, development, sealed
        require_value(letters >= 1 and held_out >= 1, f"letters {letters}, held_out {held_out}: at least 1 each")
        if development and sealed:
            raise ValueError("sealed: settings are chosen in development, which the lock-box is not for")
        if wrong := next((m for m in self.tokenizers if m not in ("image", "audio")), None):
            raise ValueError(f"tokenizers: {wrong!r}: {no_such(wrong, ('image', 'audio'))}")
        self.read = None if self.file is None else read_codes(self.file)
        made = {modality: CodeFormat.of(tokenizer) for modality, tokenizer in self.tokenizers.items()}
        self.formats = made if self.read is None else self.read.formats
        require_value(self.formats, "tokenizers: none, and no codes; such as {image: KMeansPatches}")
        super().__init__(letters + 3 + sum(format.length + 2 for format in self.formats.values()), **kwargs)
        self.documents = documents or [CodeDocument([*pair]) for pair in self.directions]
        known = (TEXT, *self.formats)
        for modality in itertools.chain(*(document.order for document in self.documents)):
            if modality not in known:
                raise ValueError(f"documents: {modality!r}: {no_such(modality, known)}")
        if not sum(document.weight for document in self.documents) > 0:
            raise ValueError("documents: all have weight 0")

    @property
    def directions(self) -> list[tuple[str, str]]:
        """Return (source, target): every modality from each other one."""
        return list(itertools.permutations((TEXT, *self.formats), 2))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text or ByteTokenizer(max(self.letters, 3))

    @cached_property
    def vocabulary(self) -> UnifiedVocabulary:
        """Return the ids of text and of all codes."""
        return UnifiedVocabulary(self.tokenizer.vocabulary, self.formats)

    @property
    def embedded_ids(self) -> int:
        """Return the number of ids that a model embeds."""
        return self.vocabulary.size

    # codes ------------------------------------------------------------------------------------------------------------

    @cached_property
    def emoji(self) -> Emoji:
        speech = self.speech if "audio" in self.formats else None
        return Emoji(
            self.size,
            speech=speech,
            development=self.development,
            sealed=self.sealed,
            folder=self.folder_of,
            tiny=self.tiny,
        )

    def prepare_data(self) -> None:
        if self.file is None:
            self.emoji.prepare_data()

    @property
    def about(self) -> dict[str, Any]:
        """Return the options that the codes depend on, besides the tokenizers."""
        speech = {"voices": self.speech.voices, "voice": self.speech.voice, "seconds": self.speech.seconds}
        options = {"size": self.size, "development": self.development, "sealed": self.sealed, "tiny": self.tiny}
        return {**options, **(speech if "audio" in self.formats else {})}

    @cached_property
    def table(self) -> CodeTable:
        if self.read is None:
            return self.encode_samples()
        require_same(self.read, self.tokenizers, self.about)
        return self.read

    def encode_samples(self) -> CodeTable:
        """Return the codes of all samples, made once in a process."""
        made_by = [(m, t.digest(), t.samples, t.fitted) for m, t in self.tokenizers.items()]
        key = (str(self.about), str(made_by), str(self.folder_of))
        table = _ENCODED.get(key)
        if table is None:
            table = _ENCODED[key] = self._encode()
        return table

    def _encode(self) -> CodeTable:
        emoji, rows = self.emoji, self._rows()
        train = rows["train"]
        for modality, tokenizer in self.tokenizers.items():
            if tokenizer.samples and not tokenizer.fitted:
                some = train[:: max(len(train) // tokenizer.samples, 1)][: tokenizer.samples]
                tokenizer.fit(torch.cat([inputs[modality] for inputs in self._inputs(some, random=True)]))
        index, codes = list[np.ndarray](), {modality: list[Tensor]() for modality in self.tokenizers}
        for name, some in rows.items():
            for inputs in self._inputs(some, random=name == "train"):
                for modality, tokenizer in self.tokenizers.items():
                    code_BT, real_BT = tokenizer.encode(inputs[modality]), tokenizer.real(inputs[modality])
                    codes[modality].append(code_BT.where(real_BT, PADDING))
            index.append(np.array([concept * len(VENDORS) + VENDORS.index(vendor) for concept, vendor, *_ in some]))
        index_N = np.concatenate(index)
        concept_N, set_N = index_N // len(VENDORS), np.repeat(list(rows), [len(some) for some in rows.values()])
        return CodeTable(
            index_N,
            emoji.pack.key_N[concept_N],
            set_N,
            np.array(emoji.pack.names)[concept_N],
            {modality: torch.cat(parts) for modality, parts in codes.items()},
            {modality: CodeFormat.of(tokenizer) for modality, tokenizer in self.tokenizers.items()},
            self.about,
            self.tokenizers,
        )

    def _rows(self) -> dict[str, list[Row]]:
        """Return set -> concept and vendor of its drawings; none for validation in development."""
        emoji = self.emoji
        vendor, unseen = emoji.held_out_vendor, np.flatnonzero(emoji.test_N & emoji.usable_N)
        val = emoji.evaluation_sets("validate").get("val")
        of_val = [] if not isinstance(val, EmojiSet) else zip(val.concept_N, val.vendor_N, val.image_N, strict=True)
        some: dict[str, list[Row]] = {
            "train": emoji.training_rows,
            "val": [(int(c), VENDORS[v], True, True) for c, v, drawn in of_val if drawn],
            "vendor": [(int(c), vendor, True, True) for c in emoji.training_concepts],
            "concept": [(int(c), v, True, True) for v in emoji.vendors for c in unseen],
        }
        drawn = {name: [row for row in rows if emoji.pack.drawings(row[1])[1][row[0]]] for name, rows in some.items()}
        return {name: rows for name, rows in drawn.items() if rows}

    def _inputs(self, rows: Sequence[Row], random: bool) -> Any:
        """Yield inputs of tokenizers, some rows at a time; ``random``: by a training voice, else the fixed one."""
        emoji = self.emoji
        some = EmojiSet(emoji, rows, random=random)
        for first in range(0, len(some), CHUNK):
            index_B = np.arange(first, min(first + CHUNK, len(some)))
            draw_B = mix_N(some.id_N[index_B], "codes")
            inputs = some.rows(index_B, draw_B).inputs
            here = {m: torch.ones(len(index_B), dtype=torch.bool) for m in emoji.modalities}
            batch = Batch(inputs, here, rng_seed=torch.from_numpy(draw_B), index=torch.from_numpy(index_B))
            batch.inputs["image"] = emoji.pixels(batch.inputs["image"], batch.rng_seed)
            if emoji.speech is not None:
                emoji.speech.view(batch, training=False)
            yield batch.inputs

    @cached_property
    def _blocks(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return modality -> ids of each row between begin and end, and which are content: ``[N, S]`` each."""
        blocks = dict[str, tuple[np.ndarray, np.ndarray]]()
        for modality, format in self.formats.items():
            code_NT = self.table.codes[modality]
            id_NS = self.vocabulary.wrap(modality, torch.where(code_NT == PADDING, format.first_T, code_NT))
            blocks[modality] = id_NS.numpy(), np.pad((code_NT != PADDING).numpy(), ((0, 0), (1, 1)))
        return blocks

    def part(self, modality: str, row: int) -> tuple[list[int], list[bool]]:
        """Return the ids of a modality of a row of the table, and which of them are content."""
        if modality == TEXT:
            ids = self.ids(str(self.table.name_N[row]))[: self.letters]
            return ids, [True] * len(ids)
        id_NS, content_NS = self._blocks[modality]
        return id_NS[row].tolist(), content_NS[row].tolist()

    def corpora(self) -> dict[str, Corpus]:
        names, none_M = self.table.name_N.tolist(), np.array([], dtype=np.int64)
        content = {f"codes of {m}": code_NT.numpy() for m, code_NT in self.table.codes.items()}
        parts = {name: Property(values, names.__getitem__) for name, values in {"samples": names, **content}.items()}
        return {"codes": Corpus(str(self.file or "emoji"), parts, [], none_M, none_M)}

    # the sets -------------------------------------------------------------------------------------------------------

    def training_set(self) -> CodeDocuments:
        return CodeDocuments(self, self.table.rows("train"))

    def bank_set(self) -> CodeDocuments:
        return CodeDocuments(self, self._some("train"), self.directions)

    def _some(self, name: str) -> np.ndarray:
        """Return rows of a set, at most ``held_out`` of them, evenly spaced."""
        rows_R = self.table.rows(name)
        return rows_R[:: -(-len(rows_R) // self.held_out)]

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        first = "vendor" if stage != "validate" or self.development else "val"
        rows_R = self._some(first)
        sets: dict[str, BatchDataset] = {first: CodeDocuments(self, rows_R, self.directions)}
        for source, target in self.directions:
            sets[f"{first}_{target}_from_{source}"] = CodeDocuments(self, rows_R, [(source, target)])
        if stage != "validate":
            sets["concept"] = CodeDocuments(self, self._some("concept"), self.directions)
            sets["shuffled"] = CodeDocuments(self, rows_R, self.directions, other=True)
        return sets
