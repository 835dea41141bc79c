"""What a configuration can bring about: every class and every argument that it reaches is walked."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import descant
from descant.cli import schema
from descant.cli.document import Node, load
from descant.cli.dump import Written
from descant.cli.errors import Refusal
from descant.cli.precheck import Walk
from descant.cli.trust import PERMITTED, is_allowed, require_kind
from descant.modules.io import saved
from descant.modules.towers import TimmTower
from tests.conftest import TRUST, Result

Cli = Callable[..., Result]
JUDGE = "descant.modules.policy.rewards.VerifierProcess"


@pytest.fixture(scope="module")
def known(written_content: dict[str, Any]) -> Written:
    return Written(written_content, "fit")


def program(folder: Path) -> dict[str, Any]:
    """An object that runs Python where it is called."""
    return {"class_path": JUDGE, "init_args": {"program": f"open({str(folder / 'ran')!r}, 'w')", "seconds": 1}}


def arguments(content: dict[str, Any]) -> Iterator[tuple[str, str, schema.Type]]:
    """Class, argument and its type, of all that a configuration reaches; of the trainer too."""
    for path, entry in content["classes"].items():
        yield from ((path, key, kind) for key, (kind, _, _) in entry["keys"].items())
    yield from (("", key, kind) for key, (kind, _, _) in content["commands"]["fit"].items())


# what is called -----------------------------------------------------------------------------------------------------


def test_whatever_is_called_is_no_choice_of_a_file(written_content: dict[str, Any], known: Written) -> None:
    """Every argument of every class whose type has a callable, with a class, a function, and lists of them."""
    tried = 0
    for path, key, kind in arguments(written_content):
        if not schema.calls(kind):
            continue
        owner, walk = (known.entry(path), Walk(known, [])) if path else (None, Walk(known, []))
        for value in ({"class_path": "torch.nn.Linear"}, "descant.modules.math.x", [{"class_path": "VerifierProcess"}]):
            try:
                walk._value(nodes(value), owner, key, schema.Key(kind), (path, key))
            except Refusal as refusal:
                assert re.search(r"would be called: --trust|is not of kind|no class|there is no", str(refusal))
                tried += 1
            else:  # only the parser itself knows whether it is a class, or of a kind
                assert schema.has_classes(kind) and (walk.unknown or isinstance(value, str)), (path, key, value)
    assert tried > 100


def nodes(value: Any) -> Node:
    if isinstance(value, dict):
        value = {key: nodes(child) for key, child in value.items()}
    elif isinstance(value, list):
        value = [nodes(child) for child in value]
    return Node(value, "x.yaml:1", Path())


#: Ways to have an object called: what of the configuration says it, with SPEC where it stands.
CALLED = {
    "LambdaLR": ("model", "schedule", {"class_path": "torch.optim.lr_scheduler.LambdaLR", "key": "lr_lambda"}),
    "CyclicLR": ("model", "schedule", {"class_path": "torch.optim.lr_scheduler.CyclicLR", "key": "scale_fn"}),
    "ThroughputMonitor": ("callback", "", {"class_path": "ThroughputMonitor", "key": "batch_size_fn"}),
    "ModelPruning": ("callback", "", {"class_path": "ModelPruning", "key": "pruning_fn"}),
    "LambdaCallback": ("callback", "", {"class_path": "LambdaCallback", "key": "on_fit_start"}),
    "BackboneFinetuning": ("callback", "", {"class_path": "BackboneFinetuning", "key": "lambda_func"}),
    "WeightAveraging": ("callback", "", {"class_path": "EMAWeightAveraging", "key": "multi_avg_fn"}),
    "a factory itself": ("model", "schedule", {}),
}


def overlay(way: str, spec: Any) -> dict[str, Any]:
    where, _, part = CALLED[way]
    node = {"class_path": part["class_path"], "init_args": {part["key"]: spec}} if part else spec
    if where == "callback":
        return {"trainer": {"callbacks+": [node]}}
    return {"model": {"schedule": {"class_path": "TorchSchedule", "init_args": {"scheduler": node}}}}


@pytest.mark.parametrize("way", CALLED)
@pytest.mark.parametrize("what", ["class", "function"])
def test_nothing_is_called_that_a_file_names(cli: Cli, workplace: Path, way: str, what: str) -> None:
    spec = program(workplace) if what == "class" else "torch.nn.init.zeros_"
    (workplace / "x.yaml").write_text(yaml.safe_dump(overlay(way, spec)))
    line = cli("check", "--config", "toy.yaml", "--config", "x.yaml", *TRUST).refusal
    assert line.startswith("x.yaml:") and not (workplace / "ran").exists()


@pytest.mark.parametrize("way", [way for way, (where, _, _) in CALLED.items() if where == "model"])
def test_nor_one_that_a_run_or_an_export_names(cli: Cli, workplace: Path, way: str) -> None:
    """A run folder of somebody else: it is evaluated, resumed, loaded and exported."""
    assert cli("fit", "--config", "toy.yaml", *TRUST, "--name", "a").rc == 0
    file = workplace / "runs/a/001/config.yaml"
    content = yaml.safe_load(file.read_text())
    node = overlay(way, program(workplace))["model"]["schedule"]
    content["model"]["init_args"]["schedule"] = {
        **node,
        "class_path": "descant.modules.training_setup.schedule.TorchSchedule",
    }
    file.write_text(yaml.safe_dump(content))
    for command in (("validate", "--run", "a/001"), ("predict", "--run", "a/001")):
        assert cli(*command, *TRUST).rc == 2
    cli("export", "a/001", "--out", "e", *TRUST)  # these two want no schedule, and leave it out
    with contextlib.suppress(ValueError):
        descant.load("runs/a/001", trust=["tests.toys"])
    with saved.policy(lambda name: None), pytest.raises(ValueError, match=r"would be called"):
        saved.build(descant.recipes.Recipe, content["model"], file)
    assert not (workplace / "ran").exists()


def test_what_the_user_names_is_called(cli: Cli, workplace: Path) -> None:
    spec = {"class_path": "ThroughputMonitor", "init_args": {"batch_size_fn": "tests.toys.ToyTower"}}
    (workplace / "x.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [spec]}}))
    assert "would be called" not in cli("check", "--config", "toy.yaml", "--config", "x.yaml", *TRUST).err


def test_a_class_can_be_trusted_by_its_full_name(cli: Cli, workplace: Path) -> None:
    name = "lightning.pytorch.callbacks.LambdaCallback"
    (workplace / "x.yaml").write_text(f"trainer: {{callbacks+: [{{class_path: {name}}}]}}\n")
    words = ("check", "--config", "toy.yaml", "--config", "x.yaml", *TRUST)
    assert cli(*words).refusal.endswith(f"--trust {name} if you trust it")
    assert cli(*words, "--trust", name).rc == 0
    assert cli(*words).rc == 2, "for one call"


# what is built ------------------------------------------------------------------------------------------------------

#: What was built before although it reads code, downloads, runs programs or writes where it is told -> where.
ELSEWHERE = {
    "torchmetrics.multimodal.CLIPScore": "torch.nn.modules.module.Module",
    "torchmetrics.text.bert.BERTScore": "torch.nn.modules.module.Module",
    "transformers.AutoModel": "torch.nn.modules.module.Module",
    "timm.models.ResNet": "torch.nn.modules.module.Module",
    "peft.PeftModel": "torch.nn.modules.module.Module",
    "lightning.pytorch.demos.boring_classes.BoringDataModule": "lightning.pytorch.core.datamodule.LightningDataModule",
    "lightning.pytorch.demos.boring_classes.BoringModel": "lightning.pytorch.core.module.LightningModule",
    "lightning.pytorch.callbacks.LambdaCallback": "lightning.pytorch.callbacks.callback.Callback",
    "descant.run.folder.Folder": "lightning.pytorch.callbacks.callback.Callback",
    "descant.report.predictions.Predictions": "lightning.pytorch.callbacks.callback.Callback",
}


@pytest.mark.parametrize("path", ELSEWHERE)
def test_what_does_more_than_its_kind_is_refused(path: str) -> None:
    kind = ELSEWHERE[path]

    def permitted(trust: list[str]) -> bool:
        try:
            require_kind(path, [kind], trust)
        except Refusal:
            return False
        return is_allowed(path, trust)

    assert not permitted([]) and permitted([path])


def test_a_transform_is_of_torchvision_or_ours(cli: Cli, workplace: Path) -> None:
    """A metric as a transform would load a folder of the working directory, with its code."""
    (workplace / "hub").mkdir()
    for path in ("torchmetrics.multimodal.CLIPScore", "torchmetrics.image.LearnedPerceptualImagePatchSimilarity"):
        (workplace / "x.yaml").write_text(f"data: {{init_args: {{transform: {{class_path: {path}}}}}}}\n")
        line = cli("check", "--config", "contrastive/emoji", "--config", "x.yaml").refusal
        assert line.startswith(f"x.yaml:1: class_path {path} is outside the allow-list")


def test_a_backbone_reads_no_file_by_its_options() -> None:
    for option in ("checkpoint_path", "pretrained_cfg", "pretrained", "cache_dir", "pretrained_cfg_overlay"):
        with pytest.raises(ValueError, match=f"options {option}: it loads files or downloads"):
            TimmTower("resnet18", options={option: "x"})


def test_of_every_wide_kind_what_ships_is_permitted(written_content: dict[str, Any]) -> None:
    shipped = {path for path in written_content["classes"] if path.startswith("descant.")}
    for kind in PERMITTED:
        for path in shipped & set(written_content["kinds"].get(kind, {"paths": []})["paths"]):
            ours = is_allowed(path) and not path.startswith(
                ("descant.run.folder", "descant.report.predictions", "descant.cli.check")
            )
            if ours and not path.startswith("descant.modules.training_setup.loggers"):
                require_kind(path, [kind])


def test_experiments_build_nothing_else() -> None:
    """What ships names no class that a user could not."""
    from descant.cli.catalogue import experiments, overlays

    for file in [*experiments().values(), *overlays().values()]:
        for key, node in load(file).walk():
            if key == "class_path" and isinstance(node.content, str) and "." in node.content:
                assert is_allowed(node.content), f"{node.where}: {node.content}"


def test_a_function_of_an_allowed_package_is_no_value() -> None:
    toy = {"class_path": "torch.optim.lr_scheduler.CyclicLR", "init_args": {"scale_fn": "torch.nn.init.zeros_"}}
    with pytest.raises(ValueError, match=r"CyclicLR.scale_fn: torch.nn.init.zeros_ would be called"):
        saved.build(torch.optim.lr_scheduler.LRScheduler, toy, Path("config.yaml"))
