"""Pseudo captions of images that ``descant predict`` embeds, as a table. Letters: N images, P phrases, A attributes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Store, embed
from descant.callbacks.plots.output import run_folder
from descant.modules.core.batch import Batch
from descant.modules.core.objects import require_objects
from descant.modules.core.rng import global_seed, mix_N
from descant.modules.io.files import write_bytes
from descant.modules.selection.pseudo_captions import CAPTIONS, PseudoCaptions
from descant.modules.tokenizers.text import Tokenizer


class WritePseudoCaptions(Callback):
    """Pseudo captions of all images that ``descant predict`` embeds, in ``captions.parquet`` beside the embeddings.

    Columns: ``index`` (int64, the sample's stable id), ``name`` (its description in the data, by which a reader checks
    that the ids are of the same data), ``sample`` (its name in the corpus), ``caption.0``, ``caption.1`` and so on.
    Templates are drawn by (seed, id), so that neither batches nor ranks change a caption. The callback does nothing in
    training. Emoji reads the table through PseudoTexts; UserData reads it as its ``table`` with ``table_key: sample``.

    Args:
        captions: attributes with their phrases, and templates.
        modality: modality of the images.
        prompts: modality of the phrases.
    """

    def __init__(self, captions: PseudoCaptions, modality: str = "image", prompts: str = "text") -> None:
        require_objects(self, captions=(captions, PseudoCaptions))
        self.captions, self.modality, self.prompts = captions, modality, prompts

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(getattr(data, "tokenizer", None), Tokenizer):
            raise ValueError(
                f"WritePseudoCaptions: {type(data).__name__} has no tokenizer for the phrases; Emoji has one"
            )
        self._store = Store().to(pl_module.device)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: int
    ) -> None:
        if self.modality not in outputs["z"]:
            raise ValueError(f"WritePseudoCaptions: no embedding of {self.modality!r}, only {', '.join(outputs['z'])}")
        self._store.update({self.modality: outputs["z"][self.modality]}, batch)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows = self._store.compute()
        del self._store
        here_N = rows.where(self.modality)
        index_N, at_N = np.unique(rows.index[here_N].cpu().numpy(), return_index=True)  # a sample may be in two sets
        z_ND, z_PD = rows.z[self.modality][here_N].cpu()[at_N], self._embed_phrases(trainer, pl_module).cpu()
        choice_NA = self.captions.choose(z_ND, z_PD)
        if trainer.is_global_zero:
            texts = self.captions.write(choice_NA, mix_N(index_N, "pseudo", global_seed()))
            self._write(trainer, index_N, texts)
            for (name, phrases), choice_N in zip(self.captions.attributes.items(), choice_NA.T.tolist(), strict=True):
                most = Counter(choice_N).most_common(3)
                print(f"  {name}: {', '.join(f'{phrases[p]} {n / len(choice_N):.0%}' for p, n in most)}")

    def _embed_phrases(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """Embed the phrases: ``z_PD``."""
        ids_PT = trainer.datamodule.tokenizer(self.captions.prompts).to(pl_module.device)  # type: ignore[attr-defined]
        present = {self.prompts: torch.ones(len(ids_PT), dtype=torch.bool, device=pl_module.device)}
        return embed(trainer, pl_module, Batch({self.prompts: ids_PT}, present))[self.prompts]

    def _write(self, trainer: L.Trainer, index_N: np.ndarray, texts: list[list[str]]) -> None:
        import pyarrow as pa  # here, since it takes long to import
        import pyarrow.parquet as pq

        data = trainer.datamodule  # type: ignore[attr-defined]
        describe, sample = getattr(data, "describe", str), getattr(data, "sample_name", str)
        columns = {"index": index_N, "name": [describe(i) for i in index_N.tolist()]}
        columns["sample"] = [sample(i) for i in index_N.tolist()]
        columns |= {f"caption.{k}": list(of) for k, of in enumerate(zip(*texts, strict=True))}
        about = {"attributes": self.captions.attributes, "templates": self.captions.templates}
        file, content = run_folder(trainer) / CAPTIONS, pa.BufferOutputStream()
        pq.write_table(pa.table(columns).replace_schema_metadata({"descant": json.dumps(about)}), content)
        write_bytes(file, content.getvalue().to_pybytes())
        print(f"{file}  {len(texts):,} images", flush=True)
