"""clip_benchmark reports of an exported run what ``descant validate`` does.

CI has not the package: pycocoevalcap, which comes with it, is 104 MB, and numpy has to be older than CI's.
In an environment of its own, ``pip install clip-benchmark 'numpy<2.4'`` lets this file run.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from tests.conftest import Result

SIZE, WIDTH = 16, 24
CLASSES = ("blue", "grey", "lime", "plum", "rose", "teal")
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGE = {**SIZES, "model_type": "clip_vision_model", "image_size": SIZE, "patch_size": 8}
TEXT = {**SIZES, "model_type": "clip_text_model", "vocab_size": 264, "max_position_embeddings": 24}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: The experiment; JSON is YAML.
RUN: dict[str, Any] = {
    "model": {
        "class_path": "Contrastive",
        "init_args": {
            "width": WIDTH,
            "norm": {"text": False},
            "pool": {"class_path": "Pools", "init_args": {"image": "FirstPool", "text": "LastPool"}},
            "towers": {
                "class_path": "Towers",
                "init_args": {
                    m: {"class_path": "TransformersTower", "init_args": {"config": config}}
                    for m, config in (("image", IMAGE), ("text", TEXT))
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        },
    },
    "data": {
        "class_path": "UserData",
        "init_args": {
            "batch_size": 32,
            "num_workers": 0,
            "path": "pairs/train/0.tar",
            "validate": {"class_path": "Shards", "init_args": {"paths": ["pairs/test/0.tar"]}},
            "fields": {
                "class_path": "Fields",
                "init_args": {
                    "image": {"class_path": "ImageField", "init_args": {"size": SIZE}},
                    "text": {
                        "class_path": "TextField",
                        "init_args": {
                            "captions": "txt",
                            "tokenizer": {"class_path": "ByteTokenizer", "init_args": {"length": 24}},
                        },
                    },
                    "labels": {
                        "kind": {
                            "class_path": "LabelField",
                            "init_args": {"field": "label", "prompts": ["{}", "a picture of {}"]},
                        }
                    },
                },
            },
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "max_steps": 60,
        "max_epochs": -1,
        "callbacks+": [
            {"class_path": "Retrieval"},
            {"class_path": "ZeroShot", "init_args": {"target": "kind"}},
        ],
    },
}


def shard(folder: Path, rows: int, seed: int) -> None:
    """A shard of images of the model's size, each with a caption that no other has: neither package resizes or ties."""
    folder.mkdir(parents=True)
    (folder / "nshards.txt").write_text("1\n")
    random = np.random.default_rng(seed)
    hue_C3 = np.random.default_rng(0).integers(64, 192, (len(CLASSES), 3))
    with webdataset.TarWriter(str(folder / "0.tar")) as tar:
        for n in range(rows):
            kind = int(random.integers(len(CLASSES)))
            noise_HW3 = random.integers(-60, 60, (SIZE, SIZE, 3))
            file = io.BytesIO()
            Image.fromarray((hue_C3[kind] + noise_HW3).astype(np.uint8)).save(file, "PNG")
            content = {"png": file.getvalue(), "txt": f"{CLASSES[kind]} {n}", "cls": str(kind), "label": CLASSES[kind]}
            tar.write(
                {"__key__": f"{n:04d}", **{k: v.encode() if isinstance(v, str) else v for k, v in content.items()}}
            )


def judged(task: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The metrics that ``clip_benchmark eval`` writes."""
    theirs: Any = importlib.import_module("clip_benchmark.cli")
    words = f"clip_benchmark eval --model_type open_clip --model local-dir:out --task zeroshot_{task} --no_amp"
    words += f" --dataset wds/pairs --dataset_root {task} --num_workers 0 --recall_k 1 5 10 --output {task}.json"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--pretrained", ""])
    theirs.main()
    metrics: dict[str, float] = json.loads(Path(f"{task}.json").read_text())["metrics"]
    return metrics


@pytest.mark.slow
def test_clip_benchmark_reports_what_validate_does(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip", reason="no open_clip: descant[exchange]")
    pytest.importorskip("clip_benchmark.cli", reason="no clip_benchmark with all it needs: pip install clip-benchmark")
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("clip_benchmark 1.6.2 makes a float of an array of one number, which numpy 2.4 refuses: numpy<2.4")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shard(Path("pairs/train"), 96, seed=1)
    shard(Path("pairs/test"), 80, seed=2)
    for task in ("retrieval", "classification"):
        Path(task).mkdir()
        Path(task, "test").symlink_to(Path("pairs/test").resolve())
    Path("retrieval/dataset_type.txt").write_text("retrieval\n")
    Path("classification/classnames.txt").write_text("\n".join(CLASSES) + "\n")
    Path("classification/zeroshot_classification_templates.txt").write_text("{c}\na picture of {c}\n")
    Path("judged.yaml").write_text(f"# CLIP on colours.\n{json.dumps(RUN)}\n")

    done = cli("fit", "--config", "judged.yaml", "--name", "judged")
    assert done.rc == 0, done.err
    done = cli("validate", "--run", "judged/001")
    assert done.rc == 0, done.err
    ours = json.loads(Path("runs/judged/001/validate-001/metrics.json").read_text())
    done = cli("export", "judged/001", "--to", "open_clip", "--out", "out")
    assert done.rc == 0, done.err

    retrieval, classification = (judged(task, monkeypatch) for task in ("retrieval", "classification"))
    theirs = {f"i2t_r{k}": retrieval[f"text_retrieval_recall@{k}"] for k in (1, 5, 10)}
    theirs |= {f"t2i_r{k}": retrieval[f"image_retrieval_recall@{k}"] for k in (1, 5, 10)}
    names = {"top1": "acc1", "top5": "acc5", "balanced": "mean_per_class_recall"}
    theirs |= {f"zeroshot_kind_{metric}": classification[name] for metric, name in names.items()}
    # of 80 rows, whose shares are 1/80 apart: the same rows are correct, and means differ by float32
    assert theirs == pytest.approx({name: ours[f"val/{name}"] for name in theirs}, abs=1e-6)
    assert 0.25 < theirs["zeroshot_kind_top1"] < 1 and 0 < theirs["i2t_r1"] < theirs["i2t_r10"] < 1
