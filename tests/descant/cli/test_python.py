"""``descant.fit`` and names of the package: the guide as it stands, and a run against that of the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar

import descant
from tests.conftest import Result

Cli = Callable[..., Result]
GUIDES = Path(__file__).parents[3] / "docs/guides"
SMALL = {"size=32": "tiny=True", "batch_size=128": "batch_size=32", "max_steps=300": "max_steps=2, accelerator='cpu'"}
#: The recipe of the guide, as options of the command line.
TOWERS = (
    "{class_path: Towers, init_args: {image: {class_path: ConvTower, init_args: {widths: [16], stem: 4}}, "
    "text: {class_path: TextTower, init_args: {vocab: 8192, width: 32, length: 24, depth: 1, heads: 2}}}}"
)


def built(**data: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    image = descant.ConvTower(widths=[16], stem=4)
    text = descant.TextTower(vocab=8192, width=32, length=24, depth=1, heads=2)
    recipe = descant.Contrastive(descant.Towers(image=image, text=text), width=32)
    return recipe, descant.Emoji(**{"batch_size": 32, "tiny": True, **data})


QUICK: dict[str, Any] = {
    "accelerator": "cpu", "max_epochs": -1, "log_every_n_steps": 1, "limit_val_batches": 0
}  # fmt: skip


def run_guide(name: str, small: dict[str, str]) -> dict[str, Any]:
    """The Python of a guide in order, with some texts replaced by others."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (GUIDES / f"{name}.md").read_text(), re.DOTALL))
    for text, other in small.items():
        assert text in code
        code = code.replace(text, other)
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope


def test_the_guide_runs_in_order(workplace: Path) -> None:
    scope = run_guide("python", SMALL)
    assert Path(scope["folder"]) == workplace / "runs/contrastive-emoji/001"
    assert not scope["recipe"].training and len(scope["similarity_BB"])
    assert set(scope["z"]) == {"image", "text"} and scope["metrics"]


def test_the_guide_to_plain_modules_runs_in_order(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scope = run_guide("plain-lightning", {})
    assert scope["trainer"].global_step == 8 and scope["resumed"].global_step == 12
    assert scope["rule"].loop.steps == 8 and scope["rule"].loop.fallbacks == 0  # of the plain loop
    assert (
        scope["observe"].looks == 8 and {"val0/accuracy/image+sound", "val0/accuracy_worst"} <= scope["metrics"].keys()
    )
    assert "warning" not in capfd.readouterr().err  # of ours: the run is resumed at the end of an epoch


def test_the_five_recipes_train_as_their_guide_has_them(workplace: Path, cli: Cli) -> None:
    quick = ("--config", "on/tiny", "--trainer.max_steps", "1", "--test", "false", "--trainer.limit_val_batches", "0")
    for name, configs in (("teacher", ["contrastive/emoji"]), ("whole", ["fusion/emoji", "with/train/mid-fusion"])):
        done = cli("fit", *(word for c in configs for word in ("--config", c)), *quick, "--name", name)
        assert done.rc == 0, done.err
    small = {"batch_size=128": "batch_size=16", "steps=20": "steps=1", "epochs=2": "steps=1"}
    small |= {"size=32": "tiny=True", "max_steps=300": "max_steps=1", "max_epochs=-1": "max_epochs=-1, **QUICK"}
    options = {key: value for key, value in QUICK.items() if key != "max_epochs"}
    small["from functools import partial"] = f"from functools import partial\nQUICK = {options!r}"
    scope = run_guide("recipes", small)
    assert scope["mae"].global_step == scope["adapted"].global_step == 1 and scope["staged"].stage == "all"
    assert {path.name for path in Path("runs").iterdir()} >= {"siglip", "mae", "student", "staged", "adapted"}


def test_a_run_has_the_folder_defaults_and_numbers_of_the_command_line(workplace: Path, cli: Cli) -> None:
    recipe, data = built()
    trainer = descant.fit(recipe, data, name="python", max_steps=2, **QUICK)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = [f"--trainer.{key}={value}".lower() for key, value in QUICK.items()]
        done = cli(
            "fit", "--model", "Contrastive", f"--model.towers={TOWERS}", "--model.width=32", "--data", "Emoji",
            "--data.batch_size=32", "--data.tiny=true", "--name", "yaml", "--trainer.max_steps=2", *options,
        )  # fmt: skip
    assert done.rc == 0, done.err
    ours, theirs = Path("runs/python/001"), Path("runs/yaml/001")

    def kinds(folder: Path) -> set[str]:
        return {re.sub(r"\d{10}.*", "", str(p.relative_to(folder))) for p in folder.rglob("*") if p.is_file()}

    assert kinds(ours) == kinds(theirs) and {p.name for p in ours.parent.iterdir()} == {"001", "latest", "metrics.json"}
    one, other = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (ours, theirs))
    assert one["trainer"] == other["trainer"] and one["seed_everything"] == other["seed_everything"] == 0
    weights = descant.load(theirs, "last").state_dict()
    assert weights.keys() == recipe.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in recipe.state_dict().items())
    assert trainer.default_root_dir == str(ours) or Path(trainer.default_root_dir) == ours.resolve()


def test_it_resumes_and_errors_are_one_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, data = built()
    descant.fit(recipe, data, [descant.Resume(every=1)], name="run", max_steps=2, **QUICK)
    whole, data = built()
    with pytest.raises(ValueError, match=r"--resume: 1 setting\(s\) differ"):
        descant.fit(whole, data, [descant.Resume(every=1)], name="run", max_steps=4, resume="auto", **QUICK)
    again, data = built()
    steps: dict[str, Any] = {"max_steps": 4, "resume": "auto", "changed": "allow"}
    trainer = descant.fit(again, data, [descant.Resume(every=1)], name="run", **steps, **QUICK)
    assert trainer.global_step == 4 and "resuming runs/run/001 from step-0000002.ckpt" in capsys.readouterr().err
    straight, data = built()
    descant.fit(straight, data, name="straight", max_steps=4, **QUICK)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in straight.state_dict().items())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_step": 3}, "fit: max_step: Trainer has no such option; nearest: max_steps"),
        ({"max_steps": "many"}, "trainer.max_steps"),
        ({"name": "../out"}, "--name ../out: "),
    ]
    for options, line in wrong:
        with pytest.raises(ValueError, match=re.escape(line)) as caught:
            descant.fit(*built(), **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="fit: data is 'emoji', and an object of kind LightningDataModule is wanted"):
        descant.fit(recipe, "emoji")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"runs/run/001: trained in Python: load\(\.\.\., into=recipe\)"):
        descant.load("runs/run/001")


def test_names_are_resolved_when_first_used() -> None:
    code = "import sys, descant; dir(descant); assert not {'torch', 'lightning', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert descant.Contrastive.__module__ == "descant.recipes.contrastive" and descant.EMA.__name__ == "EMA"
    assert {"Contrastive", "fit", "load", "KNN"} <= set(dir(descant)) and not hasattr(descant, "Nothing")


def test_the_bar_can_be_left_out(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = descant.fit(*built(), max_steps=1, enable_progress_bar=False, **QUICK)
    assert trainer.global_step == 1 and not any(isinstance(c, ProgressBar) for c in trainer.callbacks)  # type: ignore[attr-defined]
    assert "step 1/1" not in capsys.readouterr().out
    trainer = descant.fit(*built(), max_steps=1, **QUICK)
    assert any(isinstance(c, ProgressBar) for c in trainer.callbacks)  # type: ignore[attr-defined]
    assert "step 1/1" in capsys.readouterr().out
