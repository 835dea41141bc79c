"""Modalities of any name, lidar and radar, through recipes by YAML. Letters: B samples, N of a set, S pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from descant.__main__ import main as descant
from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.core.modalities import with_others
from descant.modules.io.build import build
from descant.modules.io.names import full
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.towers import ConvTower, Towers
from descant.modules.towers.heads import FlattenPool, Pools
from descant.recipes import Contrastive
from descant.recipes.base.recipe import Recipe

SIDE = 16
TOWER = {"class_path": "ConvTower", "init_args": {"widths": [8], "stem": 4, "channels": 1}}
ADAPTER = f"{{class_path: {full('PatchAdapter')}, init_args: {{size: [{SIDE}, {SIDE}], patch: 8, channels: 1}}}}"


class Scans(BatchDataset):
    def __len__(self) -> int:
        return 24

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        at_N = torch.from_numpy(index_N)
        return {"lidar": at_N % 5 != 1, "radar": at_N % 4 != 2}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        at_B = torch.from_numpy(index_B)
        x_B1SS = (at_B[:, None] + torch.arange(SIDE**2)).float().sin().view(-1, 1, SIDE, SIDE)
        return Rows({"lidar": x_B1SS, "radar": x_B1SS.flip(2)}, {"label": at_B % 2}, at_B)


class ScanData(DataModule):
    """Scans of two sensors, some of which lack one."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("lidar", "radar")

    def training_set(self) -> BatchDataset:
        return Scans(self.seed)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Scans(0)}


def run(folder: Path, name: str, model: dict[str, Any]) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    model["init_args"]["optimizer"] = optimizer
    config = {"model": model, "data": {"class_path": f"{__name__}.ScanData", "init_args": {"batch_size": 8}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    options = ["--runs", str(folder), "--name", name, "--trust", "tests", "--trainer.max_steps", "2"]
    options += ["--trainer.log_every_n_steps", "1"]
    assert descant(["fit", "--config", str(folder / f"{name}.yaml"), *options]) == 0


def towers() -> dict[str, Any]:
    return {"class_path": "Towers", "init_args": {"others": {"lidar": TOWER, "radar": TOWER}}}


def test_modalities_of_any_name_are_trained_and_adapted_by_yaml(tmp_path: Path) -> None:
    pool = {"class_path": "Pools", "init_args": {"others": {"radar": {"class_path": "MeanPool"}}}}
    run(tmp_path, "whole", {"class_path": "Contrastive", "init_args": {"towers": towers(), "width": 4, "pool": pool}})
    assert "train/lidar-radar" in (tmp_path / "whole/001/metrics.csv").read_text()
    bank = {"class_path": "ModulationBank", "init_args": {"form": {"class_path": "ScaleShift"}}}
    adapted = {
        "path": str(tmp_path / "whole"),
        "checkpoint": "last",
        "bank": bank,
        "fill": {"class_path": "PromptImputer"},
    }
    run(tmp_path, "adapted", {"class_path": "MissingModality", "init_args": adapted})


def test_modalities_of_any_name_are_masked_by_yaml(tmp_path: Path) -> None:
    model = f"""
      class_path: descant.recipes.Masked
      init_args:
        adapters: {{class_path: {full("Adapters")}, init_args: {{others: {{lidar: {ADAPTER}, radar: {ADAPTER}}}}}}}
        encoder: {{class_path: {full("Trunk")}, init_args: {{width: 16, depth: 1, heads: 2}}}}
        decoder: {{class_path: {full("CrossDecoder")}, init_args: {{width: 16, depth: 1, heads: 2}}}}
        corruption: {{class_path: {full("TokenBudget")}, init_args: {{visible: 3}}}}
    """
    recipe = build(Recipe, yaml.safe_load(model), tmp_path)
    terms = recipe.forward(next(iter(ScanData(batch_size=8).train_dataloader()))).terms
    assert [*terms] == ["mask/lidar", "mask/radar"]


def test_a_listed_name_and_any_other_are_alike() -> None:
    torch.manual_seed(0)
    tower = ConvTower([8], stem=4)
    listed, other = Towers(image=tower), Towers(others={"image": tower})
    assert [*listed.state_dict()] == [*other.state_dict()] and other.width("image") == 8
    pools = Pools(others={"lidar": FlattenPool(4, 8)})
    recipe = Contrastive(Towers(image=ConvTower([8]), others={"lidar": ConvTower([8])}), width=4, pool=pools)
    assert recipe.modalities == ("image", "lidar") and [*recipe.pairs] == ["image-lidar"]
    assert isinstance(recipe.pools["lidar"], FlattenPool)
    assert [*Adapters(others={"lidar": PatchAdapter([8, 8], 4)}).each()] == ["lidar"]


def test_a_name_given_twice_is_one_line() -> None:
    with pytest.raises(ValueError, match="others: image is given twice: under its own name too"):
        with_others({"image": 1}, {"image": 2})
