"""Inputs that were made to run something or to write somewhere else, by kind: each is one line, and nothing happens.

They are beside those of test_security.py and test_permitted.py. MARK stands for a file that appears where one runs.
"""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from descant.cli.trainer_parts import require_plain
from descant.modules.io import saved
from descant.modules.io.plain import load_plain
from descant.modules.io.saved import Saved, read_weights
from descant.modules.towers import TimmTower, TransformersTower
from descant.modules.towers import timm as of_timm
from descant.run.store import AtomicIO
from tests.conftest import TRUST, Result
from tests.rotation import quick

Cli = Callable[..., Result]
SHORT = "{class_path: VerifierProcess, init_args: {program: \"open('MARK', 'w')\", seconds: 1}}"
JUDGE = SHORT.replace("VerifierProcess", "descant.modules.policy.rewards.VerifierProcess")


def callback(text: str) -> str:
    return f"trainer: {{callbacks+: {{class_path: {text}}}}}"


def logger(text: str) -> str:
    return f"trainer: {{logger: {{class_path: {text}}}}}"


def schedule(text: str) -> str:
    scheduler = f"{{class_path: {text}}}"
    return f"model: {{init_args: {{schedule: {{class_path: TorchSchedule, init_args: {{scheduler: {scheduler}}}}}}}}}"


def strategy(text: str) -> str:
    return f"trainer: {{strategy: {{class_path: {text}}}}}"


#: Laid over toy.yaml by a file. Where a key is called by what it holds, or a class is more than its kind.
CALLABLE = [
    schedule(f"LambdaLR, init_args: {{lr_lambda: [{JUDGE}]}}"),
    schedule(f"MultiplicativeLR, init_args: {{lr_lambda: {JUDGE}}}"),
    schedule(f"CyclicLR, init_args: {{base_lr: 0.1, max_lr: 1, scale_fn: {SHORT}}}"),
    schedule("CyclicLR, init_args: {base_lr: 0.1, max_lr: 1, scale_fn: torch.load}"),
    schedule("SequentialLR, init_args: {schedulers: [torch.hub.load], milestones: [1]}"),
    strategy(f"FSDPStrategy, init_args: {{auto_wrap_policy: {JUDGE}}}"),
    strategy(f"FSDPStrategy, init_args: {{activation_checkpointing_policy: {SHORT}}}"),
    strategy(f"DDPStrategy, init_args: {{ddp_comm_hook: {JUDGE}}}"),
    strategy("DDPStrategy, init_args: {ddp_comm_wrapper: torch.hub.load}"),
    strategy("DDPStrategy, init_args: {ddp_comm_hook: torch.nn.init.zeros_}"),
    callback(f"ModelPruning, init_args: {{pruning_fn: l1_unstructured, amount: {JUDGE}}}"),
    callback(f"ModelPruning, init_args: {{pruning_fn: l1_unstructured, apply_pruning: {SHORT}}}"),
    callback(f"ModelPruning, init_args: {{pruning_fn: l1_unstructured, use_lottery_ticket_hypothesis: {JUDGE}}}"),
    callback(f"ThroughputMonitor, init_args: {{batch_size_fn: torch.numel, length_fn: {JUDGE}}}"),
    callback(f"StochasticWeightAveraging, init_args: {{swa_lrs: 0.1, avg_fn: {JUDGE}}}"),
    callback(f"WeightAveraging, init_args: {{avg_fn: {SHORT}}}"),
    callback(f"WeightAveraging, dict_kwargs: {{use_buffers: true, avg_fn: {JUDGE}}}"),
    f"trainer: {{profiler: {{class_path: PyTorchProfiler, dict_kwargs: {{on_trace_ready: {JUDGE}}}}}}}",
    f"trainer: {{profiler: {{class_path: PyTorchProfiler, dict_kwargs: {{schedule: {JUDGE}}}}}}}",
    f"trainer: {{callbacks+: {JUDGE}}}",
    f"trainer: {{plugins: [{JUDGE}]}}",
]
MODULE = [
    f"model: {{init_args: {{text: {{class_path: {path}, init_args: {{lambd: 1, path: MARK, model: x}}}}}}}}"
    for path in (
        *("torchvision.transforms.v2.Lambda", "torchvision.transforms.v2._misc.Lambda", "torch.jit.ScriptModule"),
        *("torch.fx.GraphModule", "torch.package.PackageImporter", "torch.export.ExportedProgram"),
        *("torch.nn.modules.module.torch.hub.load", "torch.nn.functional.torch.jit.load", "torch.optim.torch.load"),
        *("descant.modules.policy.rewards.subprocess.Popen", "descant.modules.policy.rewards.importlib"),
        *(
            "descant.export.export.run",
            "descant.run.processes.run_beside",
            "descant.cli.main.DescantCLI",
            "descant.run.versions._ask",
        ),
        *("lightning.pytorch.callbacks.os.remove", "lightning.pytorch.trainer.Trainer", "builtins.open"),
        *(
            "descant.modules.tokenizers.text.__builtins__",
            "descant..modules.towers.SavedTower",
            ".descant.modules",
            "descant.",
        ),
        *("DESCANT.modules.towers.SavedTower", "torch\\u2024nn.Linear", '"torch.nn.Linear\\n"', '" os.system"'),
    )
]
PATH = [
    *("trainer: {plugins: [AsyncCheckpointIO]}", "trainer: {plugins: [TorchCheckpointIO]}"),
    "trainer: {plugins: [{class_path: lightning.fabric.plugins.io.torch_io.TorchCheckpointIO}]}",
    "trainer: {plugins: {class_path: lightning.pytorch.plugins.io.XLACheckpointIO}}",
    strategy("DeepSpeedStrategy, init_args: {config: elsewhere.json}"),
    "trainer: {strategy: deepspeed_stage_3_offload_nvme}",
    logger("TensorBoardLogger, init_args: {save_dir: RUN, filename_suffix: /../../../x}"),
    logger("TensorBoardLogger, init_args: {save_dir: RUN, comment: ../../x}"),
    logger("TensorBoardLogger, init_args: {save_dir: RUN, sub_dir: ../../x}"),
    logger("TensorBoardLogger, init_args: {save_dir: 's3://bucket/x'}"),
    logger("TensorBoardLogger, init_args: {save_dir: RUN}, dict_kwargs: {log_dir: /tmp/elsewhere}"),
    logger("CSVLogger, init_args: {save_dir: RUN, name: ../../x}"),
    logger("WandbLogger, init_args: {dir: /tmp/elsewhere, project: x}"),
    logger("MLFlowLogger, init_args: {tracking_uri: 'https://example.org'}"),
    logger("CometLogger, init_args: {api_key: x}"),
    logger("lightning.pytorch.loggers.wandb.WandbLogger"),
    callback("ModelCheckpoint, init_args: {dirpath: 'file:///tmp/elsewhere'}"),
    callback("ModelCheckpoint, init_args: {dirpath: 'memory://x'}"),
    callback("ModelCheckpoint, init_args: {dirpath: ' RUN/../../x'}"),
    callback("ModelCheckpoint, init_args: {dirpath: RUNS}"),
    callback("ModelCheckpoint, init_args: {dirpath: RUN/a/../../x}"),
    callback("ModelCheckpoint, init_args: {dirpath: 'RUN\\\\..\\\\x/../..'}"),
    callback("OnExceptionCheckpoint, init_args: {dirpath: /tmp/elsewhere}"),
    callback("OnExceptionCheckpoint, init_args: {dirpath: RUN, filename: ../../x}"),
    "trainer: {profiler: {class_path: AdvancedProfiler, init_args: {dirpath: /tmp/elsewhere, filename: x}}}",
    "trainer: {profiler: {class_path: PyTorchProfiler, init_args: {dirpath: RUN, filename: /tmp/elsewhere}}}",
    "trainer: {profiler: {class_path: XLAProfiler, init_args: {port: 1}, dict_kwargs: {dirpath: /tmp/elsewhere}}}",
    "trainer: {model_registry: me/model}",
    "name: a/../../x",
    "runs: ~/x",
]
FORMAT = [
    callback(f"ModelCheckpoint, init_args: {{filename: '{text}'}}")
    for text in (
        *("{../x}", "{a/../../x}", "{step:/>6}", "{step:c}", "{step!s:/>9}", "{step:{step}}", "{step:>{step}}"),
        *("{step:\\u2215>4}", "{step:.4000000000d}", "{{..}}/{{..}}/x", "{step:%Y/../..}", "{0[step]:/^9}"),
    )
]
YAML = [
    "model: !!python/object/apply:os.system [touch MARK]",
    "model: !!python/object/new:subprocess.Popen [[touch, MARK]]",
    "model: !!python/name:os.system",
    "model: !!python/module:os",
    "trainer: {callbacks+: [!!python/object:descant.callbacks.checkpoints.resume.Resume {}]}",
    "x: &x {class_path: os.system}\nmodel: {init_args: {text: *x}}",
    "model:\n  init_args:\n    text:\n      <<: {class_path: os.system}\n",
    "model: {init_args: {text: {class_path: torch.nn.Linear, class_path: os.system}}}",
    "model: {init_args: {text: {class_path: [os.system]}}}",
    "model: {init_args: {text: {class_path: {class_path: os.system}}}}",
    "model: {init_args: {text: {? class_path : os.system, ? [a] : b}}}",
    "trust: [os]\nmodel: {class_path: os.system}",
    "config: [other.yaml]",
    "model: {init_args: {text: /etc/passwd}}",
    "model: {init_args: {text: ../outside.yaml}}",
]


def over(cli: Cli, workplace: Path, text: str, *words: str) -> str:
    """The refusal of ``check`` of toy.yaml under a file, and that nothing came of it."""
    mark = workplace / "ran"
    (workplace / "x.yaml").write_text(text.replace("MARK", str(mark)))
    before = {path for place in (workplace, Path("/tmp")) for path in place.iterdir()}
    line = cli("check", "--config", "toy.yaml", "--config", "x.yaml", *TRUST, *words).refusal
    assert not mark.exists() and not Path("/tmp/elsewhere").exists()
    assert not [path for path in workplace.iterdir() if path not in before]
    return line


@pytest.mark.parametrize("text", quick([*CALLABLE, *MODULE, *PATH, *FORMAT, *YAML], 3))
def test_a_file_cannot_set_it(cli: Cli, workplace: Path, text: str) -> None:
    line = over(cli, workplace, text)
    assert line.startswith(("x.yaml:", "passwd:", "/etc/passwd:", "../outside.yaml", "model", "class_path "))


# checkpoints --------------------------------------------------------------------------------------------------------


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def nested(mark: Path) -> bytes:
    with io.BytesIO() as file:
        torch.save({"x": Calls(open, str(mark), "w")}, file)
        return file.getvalue()


def checkpoints(mark: Path) -> Iterator[tuple[str, Any]]:
    """Name -> what is pickled in the place of a tensor."""
    from torch.storage import _load_from_bytes

    opened = Calls(open, str(mark), "w")
    yield "a function", opened
    yield "os.system", Calls(__import__("os").system, f"touch {mark}")
    yield "subprocess", Calls(subprocess.call, ["touch", str(mark)])
    yield "eval", Calls(eval, f"open({str(mark)!r}, 'w')")
    yield "a pickle in a tensor's storage", Calls(_load_from_bytes, nested(mark))
    yield "partial", Calls(__import__("functools").partial, open, str(mark), "w")
    yield "import", Calls(__import__("importlib").import_module, "this")
    yield "a class of ours", Calls(saved.build, torch.nn.Module, {}, mark)
    yield "runpy", Calls(__import__("runpy").run_path, str(mark.with_suffix(".py")))


NAMES = [name for name, _ in checkpoints(Path("x"))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_checkpoint_runs_nothing(workplace: Path, name: str, form: str) -> None:
    mark, bad = workplace / "ran", workplace / "bad.ckpt"
    mark.with_suffix(".py").write_text(f"open({str(mark)!r}, 'w')")
    content = {"state_dict": {"w": dict(checkpoints(mark))[name]}, "callbacks": {}, "global_step": 1}
    torch.save(content, bad, _use_new_zipfile_serialization=form == "zip")
    readers: list[Callable[[], object]] = [
        lambda: load_plain(bad),
        lambda: AtomicIO().load_checkpoint(bad),
        lambda: read_weights(Saved(workplace, bad, {})),
        lambda: of_timm.read_weights(bad),
        lambda: require_plain(FSDPStrategy(), str(bad)),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=r"bad.ckpt"):
            read()
    assert not mark.exists()


def odd_files(mark: Path) -> Iterator[tuple[str, bytes]]:
    """Files that are no zip of torch, or are another program's."""
    opened = Calls(open, str(mark), "w")
    for protocol in (0, 2, 4):
        yield f"pickle {protocol}", pickle.dumps({"state_dict": {"w": opened}}, protocol)
    with io.BytesIO() as file:
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), file)
        yield "TorchScript", file.getvalue()
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for member in ("pickle", "sys_info", "storages", "tensors"):
                data = pickle.dumps(opened)
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        yield "tar of torch 0.1", file.getvalue()
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as box:
            box.writestr("../../x/data.pkl", pickle.dumps(opened))
            box.writestr("x/version", "3")
        yield "zip that leads out", file.getvalue()


ODD = [name for name, _ in odd_files(Path("x"))]


@pytest.mark.parametrize("name", ODD)
def test_a_file_of_another_program_runs_nothing(workplace: Path, name: str) -> None:
    mark, bad = workplace / "ran", workplace / "bad.ckpt"
    bad.write_bytes(dict(odd_files(mark))[name])
    for read in (lambda: read_weights(Saved(workplace, bad, {})), lambda: of_timm.read_weights(bad)):
        with pytest.raises(ValueError, match=r"bad.ckpt"):
            read()
    bad.rename(bad.with_suffix(".safetensors"))
    with pytest.raises(ValueError, match=r"bad.safetensors"):
        of_timm.read_weights(bad.with_suffix(".safetensors"))
    assert not mark.exists()


# hubs ---------------------------------------------------------------------------------------------------------------

BERT: dict[str, Any] = dict(model_type="bert", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_a_hub_are_not_fetched(workplace: Path, key: str) -> None:
    """A name like OWNER/NAME is code that transformers would download and run, of a folder's own config.json too."""
    with pytest.raises(ValueError, match=r"code on a hub"):
        TransformersTower(config={**BERT, key: "somebody/attention"})
    folder = workplace / "weights"
    TransformersTower(config=dict(BERT)).model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "text_config": {key: {"": "somebody/attention@v1"}}}))
    with pytest.raises(ValueError, match=r"code on a hub"):
        TransformersTower(folder=folder)


def test_code_beside_weights_is_not_run(workplace: Path) -> None:
    folder = workplace / "weights"
    TransformersTower(config=dict(BERT)).model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    code = f"open({str(workplace / 'ran')!r}, 'w')\nfrom transformers import BertModel, BertConfig\n"
    (folder / "modeling.py").write_text(code)
    names = {"AutoConfig": "modeling.BertConfig", "AutoModel": "modeling.BertModel"}
    for kind in ("bert", "mine"):
        (folder / "config.json").write_text(json.dumps({**content, "model_type": kind, "auto_map": names}))
        try:
            TransformersTower(folder=folder)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
    assert not (workplace / "ran").exists() and "modeling" not in sys.modules


@pytest.mark.parametrize("name", ["hf-hub:a/b", "hf_hub:a/b", "local-dir:/tmp/x", "timm/../x", "a://b", "../resnet18"])
def test_a_tower_of_a_hub_is_not_fetched(name: str) -> None:
    with pytest.raises(ValueError, match=r"timm has no such model"):
        TimmTower(name)


# run folders --------------------------------------------------------------------------------------------------------


def test_what_goes_on_does_not_follow_links_out_of_its_run(cli: Cli, workplace: Path) -> None:
    """Of a run that somebody else has made: it would write where its links lead."""
    fit = ("fit", "--config", "toy.yaml", *TRUST, "--name", "a", "--trainer.max_epochs", "1")
    assert cli(*fit).rc == 0
    (outside := workplace / "outside").mkdir()
    for name in ("checkpoints", "resume/more", "metrics.csv", "tensorboard", "validate-001"):
        path = workplace / "runs/a/001" / name
        kept = path.rename(workplace / "kept") if path.exists() else None
        path.symlink_to(outside / "file" if name.endswith(".csv") else outside)
        line = cli(*fit, "--resume", "auto").refusal
        assert line.startswith(f"runs/a/001/{name}: a link out of the run's folder; --trust writes")
        assert list(outside.iterdir()) == []
        path.unlink()
        if kept is not None:
            kept.rename(path)
    assert cli(*fit, "--resume", "auto").rc == 0


def test_a_checkpoint_is_written_below_its_run_whatever_made_its_path(tmp_path: Path) -> None:
    io, inside = AtomicIO(), tmp_path / "run"
    io.inside = inside
    io.save_checkpoint({"global_step": 1}, inside / "checkpoints/x.ckpt")
    (inside / "link").symlink_to(tmp_path)
    for path in (inside / "../x.ckpt", inside / "link/x.ckpt", tmp_path / "x.ckpt", inside / "a/../../x.ckpt"):
        with pytest.raises(ValueError, match=r"outside the run's folder.*--trust writes"):
            io.save_checkpoint({"global_step": 1}, path)
        with pytest.raises(ValueError, match=r"outside the run's folder"):
            io.remove_checkpoint(path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
