"""Intra-modal retrieval, and modality inversion (OTI, OVI).

Letters: N rows of a set, Q queries, G gallery rows, D width, C classes, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning as L
from torch import Tensor

from descant.callbacks.evaluate.classification import ZeroShot
from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, Rows, Values, scalar
from descant.modules.core.capabilities import has
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import Embeds, Inverts
from descant.modules.evaluation.inversion import (
    Inverted,
    ModalityInversion,
    patch_frame,
    rows_of_other_keys,
    split_template,
    text_frame,
    tower_of,
)
from descant.modules.evaluation.items import Items
from descant.modules.evaluation.metrics import average_precision, chance_average_precision
from descant.modules.tokenizers.text import Tokenizer


class _BankRetrieval(EmbeddingEvaluator):
    """Base of the evaluations of retrieval in the data module's bank."""

    needs_of_data: ClassVar[tuple[str, ...]] = ("bank_dataloader",)
    _test_sets: Callable[[str], Mapping[str, Any]] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._test_sets = getattr(data, "evaluation_sets", None) if stage != "test" else None

    def _select_sets(self, sets: dict[str, Rows], modality: str) -> dict[str, Rows]:
        """Select the named sets, or all; a validation skips those that only the test has."""
        name = type(self).__name__
        unknown = [s for s in self.sets or [] if s not in sets]
        if unknown and self._test_sets is not None:
            test_sets = self._test_sets("test")
            unknown = [s for s in unknown if s not in test_sets]
        if unknown:
            raise ValueError(f"{name}: no set {unknown[0]!r}; this evaluation has {', '.join(sets)}")
        for rows in sets.values():
            self.require_embedding(rows, modality)
        return {s: sets[s] for s in self.sets or sets if s in sets}

    def _labels(self, rows: Rows, gallery: Rows, target: str | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Map a key's suffix to the labels of rows and gallery. Equal labels are a match: by content, or by target."""
        labels = {"": (rows.key, gallery.key)}
        if target is not None:
            self.require_target(target, set(rows.targets) & set(gallery.targets))
            labels[f"_{target}"] = rows.targets[target], gallery.targets[target]
        return labels


class IntraModal(_BankRetrieval):
    """Mean average precision of retrieval within one modality, with the data module's bank as the gallery.

        AP_q = 1 / |matches_q|  sum over matches g of  #{matches up to rank g} / rank g

    A query is a row of an evaluation set, such as a drawing by a vendor without training data; matches are the training
    samples of the same content (equal key), or those with the same ``target``. A query's own row is excluded from the
    gallery, and queries without a match do not count. A random order gives
    :func:`~descant.modules.evaluation.metrics.chance_average_precision`: about (R + ln G) / G for R matches among G.
    Keys: ``{set}/map_{modality}`` and ``{set}/map_{target}_{modality}``, for the sets with such queries.

    Args:
        modality: modality of queries and gallery.
        target: a target of the data whose equality is a match as well, or none.

    >>> IntraModal(target="subgroup").modality
    'image'
    """

    identity = ("modality", "target")

    def __init__(
        self, modality: str = "image", target: str | None = None, sets: list[str] | None = None, validate: bool = False
    ) -> None:
        super().__init__(sets, validate)
        self.modality, self.target = modality, target

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        m, values = self.modality, dict[str, Tensor | Items]()
        chosen, bank = self._select_sets(sets, m), self.bank(trainer, pl_module)
        at_G = bank.where(m)
        for name, rows in chosen.items():
            for suffix, (label_N, label_bank_N) in self._labels(rows, bank, self.target).items():
                at_Q = (rows.present[m] & (label_N >= 0)).nonzero().squeeze(1)
                precision_Q = average_precision(
                    rows.z[m][at_Q],
                    label_N[at_Q],
                    bank.z[m][at_G],
                    label_bank_N[at_G],
                    rows.index[at_Q],
                    bank.index[at_G],
                )
                found_Q = ~precision_Q.isnan()
                values[f"{name}/map{suffix}_{m}"] = Items(precision_Q[found_Q], rows.key[at_Q][found_Q])
        return _drop_undefined(values)


class Inversion(_BankRetrieval):
    """Intra-modal retrieval by modality inversion (OTI, OVI): queries mapped into the other modality first.

        OTI:  v_q = pseudo-words such that f_text("a picture of v_q") is closest to z_image_q;
              f_text("a picture of v_q") replaces z_image_q as the query of the gallery of images
        OVI:  the same for texts, with pseudo-patches and the image tower, where ``ovi`` is given

    Keys of OTI (for OVI: ``ovi_...``, and ``native_..._text``), on the same queries and the same gallery:
    ``{set}/oti_cos``, mean cosine of inverted embedding and target; ``oti_monotone``, share of 50-step marks at which
    the mean loss fell; ``oti_map`` and ``native_map``, mean average precision with and without inversion; ``oti_gain``,
    their difference; ``oti_map_sham``, with the inverted embeddings permuted among queries of other content;
    ``oti_map_chance``, that of a random order. These five are repeated with ``_{target}`` after ``map`` or ``gain``,
    where a match is an equal target instead of equal content. The targets in ``named`` also have ``zeroshot_{target}``,
    zero-shot accuracy by prompts, and ``zeroshot_{target}_oti``, that of the inverted embedding: text compared with
    text. Likewise, the texts of the set have ``names_map`` and ``names_map_oti``, where a match is equal content.

    The gallery of OTI is the data module's bank; that of OVI is the texts of the set. A query's own row is excluded
    from both, and texts of equal content from the latter: without a target, OVI has only cosine and monotony.

    Args:
        template: the text around the pseudo-words, with ``{}`` in their place.
        modality: modality of OTI's queries.
        through: the modality that they are inverted into.
        target: a target of the data whose equality is a match as well, or none.
        named: the targets of zero-shot classification; only ``target`` if not given.
        limit: maximum queries of a set, evenly spaced over it.
        oti: the optimization; 150 steps by default.
        ovi: the optimization of texts into pseudo-patches, such as 1000 steps, or none. For towers of patches.

    Source: arXiv 2502.04263.

    >>> Inversion(template="a picture")
    Traceback (most recent call last):
    ValueError: template 'a picture' has 0 places {}; one is needed: 'a picture of {}'
    """

    needs = (Embeds, Inverts)
    needs_of_data = ("bank_dataloader", "tokenizer")
    identity = ("template", "modality", "through")

    def __init__(
        self,
        template: str = "a picture of {}",
        modality: str = "image",
        through: str = "text",
        target: str | None = None,
        named: list[str] | None = None,
        sets: list[str] | None = None,
        limit: int = 128,
        oti: ModalityInversion | None = None,
        ovi: ModalityInversion | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__(sets, validate)
        require_objects(self, oti=(oti, ModalityInversion), ovi=(ovi, ModalityInversion))
        split_template(template)
        if limit < 2:
            raise ValueError(f"Inversion: limit {limit}: the sham needs another query; 2 is the least")
        self.template, self.modality, self.through, self.target = template, modality, through, target
        self.limit, self.oti, self.ovi = limit, oti or ModalityInversion(), ovi
        targets = named if named is not None else [] if target is None else [target]
        self._prompts = {name: ZeroShot(name, modality, prompts=through) for name in targets}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        assert has(pl_module, Inverts)
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError("Inversion: the data module has no tokenizer for the template; Emoji has one")
        self._tokenizer = tokenizer
        text_frame(pl_module, self.through, tokenizer, self.template, self.oti.tokens)
        if self.ovi is not None:
            tower_of(pl_module, self.modality)
        for prompts in self._prompts.values():
            prompts.setup(trainer, pl_module, stage)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        assert has(pl_module, Inverts)
        values: dict[str, Tensor] = {}
        a, b, bank = self.modality, self.through, self.bank(trainer, pl_module)
        classes = {target: prompts.classifier(trainer, pl_module) for target, prompts in self._prompts.items()}
        frame = text_frame(pl_module, b, self._tokenizer, self.template, self.oti.tokens)
        for name, rows in self._select_sets(sets, a).items():
            at_Q = self._queries(rows, a)
            if len(at_Q) == 0:
                continue
            inverted = self.oti(pl_module, b, frame, rows.z[a][at_Q], rows.index[at_Q])
            values |= self._scores(f"{name}/", "oti", inverted, rows, at_Q, bank, a, bank.index, rows.index)
            at_G = rows.where(b)
            rest = rows.key[at_Q], rows.z[b][at_G], rows.key[at_G]
            values[f"{name}/names_map"] = average_precision(rows.z[a][at_Q], *rest).nanmean()
            values[f"{name}/names_map_oti"] = average_precision(inverted.z_BD.to(rest[1]), *rest).nanmean()
            for target, w_CD in classes.items():
                values |= self._zero_shot_metrics(f"{name}/zeroshot_{target}", target, inverted, rows, at_Q, w_CD)
        if self.ovi is None:
            return _drop_undefined(values)
        frame = patch_frame(pl_module, a, self.ovi.tokens)
        for name, rows in self._select_sets(sets, b).items():
            at_Q = self._queries(rows, b)
            if len(at_Q) > 0:
                inverted = self.ovi(pl_module, a, frame, rows.z[b][at_Q], rows.index[at_Q])
                values |= self._scores(f"{name}/", "ovi", inverted, rows, at_Q, rows, b, rows.key, rows.key)
        return _drop_undefined(values)

    def _queries(self, rows: Rows, modality: str) -> Tensor:
        at_N = rows.where(modality)
        return at_N[:: max(-(-len(at_N) // self.limit), 1)]

    def _scores(
        self,
        place: str,
        way: str,
        inverted: Inverted,
        rows: Rows,
        at_Q: Tensor,
        gallery: Rows,
        modality: str,
        id_gallery_N: Tensor,
        id_N: Tensor,
    ) -> dict[str, Tensor]:
        """Score all but zero-shot. Queries are ``at_Q`` of ``rows``; gallery rows with a query's id are excluded."""
        values = {f"{place}{way}_cos": inverted.cos_B.mean(), f"{place}{way}_monotone": inverted.monotone()}
        at_G, of = gallery.where(modality), "" if modality == self.modality else f"_{modality}"
        z_Q, z_G = rows.z[modality][at_Q], gallery.z[modality][at_G]
        other_Q, z_inverted_Q = rows_of_other_keys(rows.key[at_Q]), inverted.z_BD.to(z_G)
        for suffix, (label_N, label_gallery_N) in self._labels(rows, gallery, self.target).items():
            keep = label_N[at_Q] >= 0
            rest = (label_N[at_Q][keep], z_G, label_gallery_N[at_G], id_N[at_Q][keep], id_gallery_N[at_G])
            native, across, sham = (
                average_precision(z[keep], *rest).nanmean() for z in (z_Q, z_inverted_Q, z_inverted_Q[other_Q])
            )
            values[f"{place}native_map{suffix}{of}"], values[f"{place}{way}_map{suffix}"] = native, across
            values[f"{place}{way}_gain{suffix}"] = across - native
            if int(rows.key[at_Q].unique().numel()) > 1:
                values[f"{place}{way}_map{suffix}_sham"] = sham
            values[f"{place}{way}_map{suffix}_chance"] = chance_average_precision(rest[0], *rest[2:])
        return values

    def _zero_shot_metrics(
        self, key: str, target: str, inverted: Inverted, rows: Rows, at_Q: Tensor, w_CD: Tensor
    ) -> dict[str, Tensor]:
        label_Q = rows.targets[target][at_Q]
        keep, z_Q = label_Q >= 0, rows.z[self.modality][at_Q]
        return {
            name: ((z_QD @ w_CD.T).argmax(dim=1) == label_Q)[keep].double().mean()
            for name, z_QD in ((key, z_Q), (f"{key}_oti", inverted.z_BD.to(z_Q)))
        }


def _drop_undefined(values: Values) -> Values:
    """Drop the metrics for which no query has a match."""
    return {key: value for key, value in values.items() if not bool(scalar(value).isnan())}
