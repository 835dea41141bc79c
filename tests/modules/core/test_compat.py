"""What torch, lightning and jsonargparse have to keep, as the files of ``modules/core/compat`` state it.

A release that breaks one of these fails in one line, which names the release and the file.
"""

from __future__ import annotations

import importlib
import inspect
import json
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import lightning as L
import pytest
import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils.parametrizations import orthogonal

from tests.ranks import run_ranks

FOLDER = Path(__file__).resolve().parents[3] / "modules" / "core" / "compat"
#: File -> library, if it is not torch.
LIBRARIES = dict.fromkeys(("accelerator", "launcher", "logged"), "lightning") | {"jsonargparse": "jsonargparse"}


@contextmanager
def relying_on(name: str, what: str) -> Iterator[Any]:
    """Yield a file of the folder; an exception inside fails the test in one line."""
    try:
        yield importlib.import_module(f"descant.modules.core.compat.{name}")
    except Exception as error:
        library = LIBRARIES.get(name, "torch")
        line = str(error).partition("\n")[0]
        failure = f"{library} {version(library)}, modules/core/compat/{name}.py: {what}: {type(error).__name__}: {line}"
        raise pytest.fail.Exception(failure, pytrace=False) from None


def test_every_name_is_tested() -> None:
    tests = Path(__file__).read_text()
    for file in sorted(FOLDER.glob("[!_]*.py")):
        module = importlib.import_module(f"descant.modules.core.compat.{file.stem}")
        assert f'relying_on("{file.stem}"' in tests, file
        assert not [name for name in module.__all__ if f"compat.{name}" not in tests], file


def test_a_broken_promise_is_one_line() -> None:
    with pytest.raises(pytest.fail.Exception) as caught, relying_on("pytree", "leaves") as compat:
        compat.tree_leaves()
    assert f"torch {version('torch')}, modules/core/compat/pytree.py: leaves: TypeError: " in str(caught.value)
    assert "\n" not in str(caught.value) and not caught.value.pytrace


class Pair(NamedTuple):
    """A container of two."""

    a: Any
    b: Any


def test_pytree() -> None:
    with relying_on("pytree", "containers keep their kind and order, and all else is a leaf") as compat:
        nested = {"z": [1, (2, None)], "a": Pair(3, {4})}
        assert compat.tree_leaves(nested) == [1, 2, None, 3, {4}]
        made = compat.tree_map(str, nested)
        assert made == {"z": ["1", ("2", "None")], "a": Pair("3", "{4}")} and list(made) == ["z", "a"]
        assert type(made["a"]) is Pair


def test_dispatch() -> None:
    with relying_on("dispatch", "a mode receives all operators, those of a backward pass too") as compat:
        seen: list[Any] = []

        class Mode(compat.TorchDispatchMode):  # type: ignore[name-defined]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append((func, isinstance(args, tuple)))
                return func(*args, **(kwargs or {}))

        x = torch.ones(2, requires_grad=True)
        with Mode():
            y = x.sin().sum()
            assert (torch.ops.aten.sin.default, True) in seen
            y.backward()
        assert (torch.ops.aten.cos.default, True) in seen
    with relying_on("dispatch", "kernels of one key are skipped") as compat:
        x = torch.ones(2, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.mm(x, x).dtype == torch.bfloat16
            with compat.skipping_kernels("AutocastCPU"):
                assert torch.mm(x, x).dtype == torch.float32
            assert torch.mm(x, x).dtype == torch.bfloat16


def test_fake() -> None:
    with relying_on("fake", "fake tensors have shapes, types and strides, and no values") as compat:
        mode = compat.FakeTensorMode(allow_non_fake_inputs=True)
        x = mode.from_tensor(torch.ones(3, 2).T)
        assert isinstance(x, compat.FakeTensor) and (x.shape, x.stride(), x.device.type) == ((2, 3), (1, 2), "cpu")
        with mode:
            y = x @ torch.ones(3, 4)
            assert isinstance(y, compat.FakeTensor) and y.shape == (2, 4)
            with pytest.raises(compat.DataDependentOutputException):
                y.sum().item()
            with pytest.raises(compat.DynamicOutputShapeException):
                y.nonzero()


@contextmanager
def fake_ranks(world: int, rank: int) -> Iterator[None]:
    """Open a group with one real rank."""
    importlib.import_module("descant.modules.core.compat.fake_group")  # registers the backend
    dist.init_process_group("fake", rank=rank, world_size=world, store=dist.HashStore())  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_fake_group() -> None:
    with relying_on("fake_group", "a rank of a hundred goes on alone, and never asks its store for others") as compat:
        assert list(inspect.signature(compat.create_fake_group).parameters) == ["common_opts", "backend_opts"]
        with fake_ranks(100, 99):
            x = torch.ones(2)
            dist.all_reduce(x)
            dist.barrier()
            assert dist.get_world_size(dist.new_group([1, 99])) == 2


def _python_device(_: int) -> bool:
    from descant.modules.core.compat import python_device as compat

    class Module(compat.PythonDeviceModule):
        """A module with one function more."""

        def extra(self) -> int:
            return 7

    compat.register_python_device("toy", backend_module=Module())
    device: Any = torch.get_device_module("toy")
    asked = (device.is_available(), device.is_initialized(), device.device_count(), device.current_device())
    return bool(asked == (True, True, 1, 0) and device.extra() == 7 and torch.device("toy", 0).type == "toy")


@pytest.mark.ddp
def test_python_device() -> None:
    with relying_on("python_device", "a device is registered from Python") as compat:
        parameters = inspect.signature(compat.register_python_device).parameters
        assert list(parameters)[:2] == ["rename", "backend_module"]
        assert compat.PythonDeviceModule().is_available()
        assert run_ranks(1, _python_device) == [True]  # a process keeps it
    with relying_on("python_device", "constructors take a device") as compat:
        assert {torch.empty, torch.rand, torch.arange, torch.tensor} <= compat.device_constructors()
        assert torch.empty_like not in compat.device_constructors()


def test_fsdp() -> None:
    calls: list[Any] = []

    def split(tensor: Tensor, number: int, dim: int) -> list[Tensor]:
        calls.append((tuple(tensor.shape), number, dim))
        return [*tensor.split(2, dim), tensor.new_empty(0)]

    with relying_on("fsdp", "parameters are split by the function, and sharded modules are found") as compat:
        layer = nn.Linear(3, 6, bias=False)
        whole = layer.weight.detach().clone()
        with fake_ranks(4, 1):
            with compat.chunking_with(split):
                fully_shard(layer, mesh=init_device_mesh("cpu", (4,)))
            assert {*calls} == {((6, 3), 4, 0)}
            calls.clear()
            sharded: Any = layer.weight
            assert torch.equal(sharded.to_local(), whole[2:4])
            assert layer in compat.sharded_modules()
            other = nn.Linear(3, 6)
            fully_shard(other, mesh=init_device_mesh("cpu", (4,)))
            assert not calls and other in compat.sharded_modules()


@pytest.mark.parametrize("rows", [10, 2])
def test_dtensor(rows: int) -> None:
    with relying_on("dtensor", "the box is that which distribute_tensor cuts out") as compat, fake_ranks(4, 3):
        mesh, x = init_device_mesh("cpu", (4,)), torch.arange(3.0 * rows).reshape(rows, 3)
        shape, offset = compat.local_shape_and_offset(x.shape, mesh, [Shard(0)])
        assert (tuple(shape), tuple(offset)) == (((1, 3), (9, 0)) if rows == 10 else ((0, 3), (2, 0)))
        local = distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None).to_local()
        assert torch.equal(local, x[tuple(slice(a, a + b) for a, b in zip(offset, shape, strict=True))])


def _talk(rank: int) -> tuple[bytes, list[Any]]:
    from descant.modules.core.compat import distributed as compat

    dist.init_process_group("gloo")
    shared: Any = compat.default_store()
    store = shared.clone()
    store.set(f"from {rank}", "met")
    dist.all_reduce(torch.ones(5))
    entries = [e for dump in compat.flight_recorders() for e in json.loads(dump()).get("entries", ())]
    found = store.get(f"from {1 - rank}")
    dist.barrier()
    dist.destroy_process_group()
    return found, entries


@pytest.mark.ddp
def test_distributed() -> None:
    with relying_on("distributed", "stores are cloned, and collectives recorded") as compat:
        assert compat.flight_recorders()
        for found, entries in run_ranks(2, _talk):
            assert found == b"met"
            (entry, *_) = [e for e in entries if e["profiling_name"] == "gloo:all_reduce"]
            assert entry["collective_seq_id"] == 1 and entry["input_sizes"] == [[5]]
            assert {"state", "retired"} <= entry.keys()


def test_autograd() -> None:
    with relying_on("autograd", "a backward pass is noticed, and its callback comes last") as compat:
        seen: list[Any] = []
        x = torch.ones(2, requires_grad=True)

        def hook(grad: Tensor) -> None:
            seen.append(compat.is_in_backward())
            compat.queue_callback(lambda: seen.append(None if x.grad is None else x.grad.tolist()))

        loss = x.sin().sum()
        loss.register_hook(hook)
        assert not compat.is_in_backward()
        loss.backward()
        assert seen == [True, torch.ones(2).cos().tolist()] and not compat.is_in_backward()


def test_foreach() -> None:
    with relying_on("foreach", "lists of tensors have the bits of a loop") as compat:
        generator = torch.Generator().manual_seed(0)
        a, b = ([torch.randn(n, generator=generator) for n in (3, 1000)] for _ in range(2))
        for how in ([], [torch.inf]):
            norms = [torch.linalg.vector_norm(x, *how) for x in a]
            assert all(map(torch.equal, compat.foreach_norm(a, *how), norms))
        for fused, loop in (
            (lambda x: compat.foreach_mul_(x, torch.tensor(0.3)), lambda x, y: x * torch.tensor(0.3)),
            (lambda x: compat.foreach_lerp_(x, b, 0.1), lambda x, y: x.lerp(y, 0.1)),
            (lambda x: compat.foreach_copy_(x, b), lambda x, y: y),
        ):
            some = [x.clone() for x in a]
            fused(some)
            assert all(map(torch.equal, some, map(loop, a, b)))
    with relying_on("foreach", "fused AdamW is that of the optimizer") as compat:
        p = nn.Parameter(a[0].clone())
        p.grad = b[0].clone()
        torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1, fused=True).step()
        some, state = [a[0].clone()], [[torch.zeros(3)] for _ in range(2)]
        options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False}
        compat.fused_adamw_(some, [b[0]], *state, [], [torch.ones(())], maximize=False, **options)
        assert torch.equal(some[0], p)


def test_layers() -> None:
    with relying_on("layers", "layers of a kind derive from its base") as compat:
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d)
        convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        dropouts = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
        assert all(issubclass(kind, compat.BatchNorm) for kind in norms)
        assert all(issubclass(kind, compat.NormBase) for kind in (*norms, nn.InstanceNorm2d))
        assert not issubclass(nn.InstanceNorm2d, compat.BatchNorm) and not issubclass(nn.LayerNorm, compat.NormBase)
        assert all(issubclass(kind, compat.Conv) for kind in (*convs, *transposed))
        assert [kind for kind in (*convs, *transposed) if issubclass(kind, compat.ConvTranspose)] == [*transposed]
        assert all(issubclass(kind, compat.Dropout) for kind in dropouts)
        norm, dropout = nn.BatchNorm1d(2), nn.Dropout(0.25)
        assert norm.track_running_stats and norm.momentum == 0.1 and norm.num_batches_tracked is not None
        assert vars(dropout)["p"] == 0.25
    with relying_on("layers", "an orthogonal weight is base @ map(X)") as compat:
        made: Any = orthogonal(nn.Linear(3, 3), orthogonal_map="cayley")
        part, X = made.parametrizations.weight[0], made.parametrizations.weight.original
        assert type(part) is compat.Orthogonal
        A, one = X.tril() - X.tril().mT, torch.eye(3)
        assert torch.equal(made.weight, part.base @ torch.linalg.solve(one - 0.5 * A, one + 0.5 * A))


def test_memory() -> None:
    with relying_on("memory", "a storage has a number, which its views share") as compat:
        fake = importlib.import_module("descant.modules.core.compat.fake").FakeTensorMode()
        for mode in (contextmanager(lambda: iter([None]))(), fake):
            with mode:
                x, y = torch.empty(4), torch.empty(4)
            ids = [compat.storage_id(some.untyped_storage()) for some in (x, x[1:], x.view(2, 2), y)]
            assert ids[0] == ids[1] == ids[2] != ids[3] and isinstance(ids[0], int)
    with relying_on("memory", "the history of CUDA's allocator begins, is written and ends") as compat:
        assert {"enabled", "max_entries"} <= inspect.signature(compat.record_memory_history).parameters.keys()
        assert inspect.signature(compat.dump_snapshot).parameters


def test_accelerator() -> None:
    with relying_on("accelerator", "choices of the precision, and the accelerator of auto") as compat:
        hint = get_type_hints(L.Trainer.__init__)["precision"]
        assert set(get_args(compat.PrecisionInput)) <= set(get_args(hint))
        assert {"bf16-mixed", "32-true"} <= {c for kind in get_args(compat.PrecisionInput) for c in get_args(kind)}
        trainer = L.Trainer(accelerator="auto", logger=False, enable_checkpointing=False, devices=1)
        kind = compat.choose_auto_accelerator()
        assert kind in ("cpu", "cuda", "mps") and kind.upper() in type(trainer.accelerator).__name__.upper()


def test_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    with relying_on("launcher", "a strategy of local ranks has it, and launch takes these steps") as compat:
        strategy = DDPStrategy(cluster_environment=LightningEnvironment(), parallel_devices=[torch.device("cpu")] * 2)
        strategy._configure_launcher()
        launcher: Any = strategy.launcher
        assert isinstance(launcher, compat.SubprocessScriptLauncher)
        assert (launcher.num_processes, launcher.num_nodes, launcher.procs) == (2, 1, [])
        steps: list[Any] = []
        module = importlib.import_module(type(launcher).__module__)
        monkeypatch.setattr(launcher, "_call_children_scripts", lambda: steps.append("ranks"))
        monkeypatch.setattr(module, "_launch_process_observer", lambda procs: steps.append("observer"))
        monkeypatch.setattr(module, "_set_num_threads_if_needed", lambda num_processes: steps.append(num_processes))
        monkeypatch.setattr(LightningEnvironment, "validate_settings", lambda *_, **__: steps.append("validate"))
        assert launcher.launch(lambda x, y: x + y, 3, y=4, trainer=None) == 7
        assert steps == ["validate", "ranks", "observer", 2]
        compat.start_ranks(launcher)
        assert steps[4:] == ["ranks"]
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # where it is set, it holds
        compat.set_num_threads_if_needed(num_processes=2)
        assert torch.get_num_threads() == 1


class Logging(L.LightningModule):
    """Logs 1 and 3, of 2 rows each, and looks at what Lightning keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        value = 1.0 + 2.0 * batch_idx
        self.log("value", value, on_step=True, on_epoch=True, batch_size=2)
        return self.weight * value

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        results: Any = self.trainer.fit_loop.epoch_loop._results
        self.seen = [(key, result, result.meta, result.meta.sync) for key, result in results.items()]
        if batch_idx == 1:
            result = self.seen[0][1]
            self.numbers = [float(x) for x in (result.value, result.cumulated_batch_size, result._forward_cache)]
            self.counts = (result._update_count, result.has_reset, result.is_tensor)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_logged() -> None:
    with relying_on("logged", "the values of an epoch are kept as sums, rows and last values") as compat:
        model = Logging()
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
        trainer.fit(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(2))))
        ((key, result, meta, sync),) = model.seen
        assert type(result) is compat.ResultMetric and type(meta) is compat.Metadata and type(sync) is compat.Sync
        assert model.numbers == [8.0, 4.0, 3.0] and model.counts == (2, False, True)
        names = ("name", "fx", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
        assert key.endswith("value") and [getattr(meta, name) for name in names[:2]] == ["value", "training_step"]
        assert all(isinstance(getattr(meta, name), bool) for name in names[2:])
        assert (meta.is_mean_reduction, meta.dataloader_idx, sync.group, sync.should) == (True, None, None, False)
    with relying_on("logged", "a result is built from its parts") as compat:
        meta = compat.Metadata("training_step", "value", on_step=True, reduce_fx="sum")
        meta.sync = compat.Sync(fn=lambda x, **_: x, _should=True, rank_zero_only=False)
        assert meta.reduce_fx is torch.sum and meta.sync.should and not meta.is_mean_reduction
        again = compat.ResultMetric(meta, is_tensor=True).to("cpu")
        again.value, again._update_count = torch.tensor(5.0), 1
        assert float(again.compute()) == 5.0


class Kind:
    """A class with arguments."""

    def __init__(self, size: int, name: str = "a") -> None:
        self.size = size


class Narrow(Kind):
    """A class of that kind."""


def parser() -> tuple[ArgumentParser, dict[str, Any]]:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--config", action="config")
    made.add_argument("--number", type=int, default=1)
    made.add_argument("--kind", type=Kind)
    return made, {action.dest: action for action in made._actions}


def test_jsonargparse_actions() -> None:
    with relying_on("jsonargparse", "actions have types, which accept and refuse values") as compat:
        made, actions = parser()
        assert isinstance(actions["config"], compat.ActionConfigFile)
        plain = {action.dest for action in compat.filter_non_parsing_actions(made._actions)}
        assert {"number", "kind"} <= plain and "help" not in plain
        number, kind = actions["number"], actions["kind"]
        assert (number._typehint, kind._typehint) == (int, Kind)
        assert compat.ActionTypeHint.is_subclass_typehint(Kind) and not compat.ActionTypeHint.is_subclass_typehint(int)
        compat.check_value(made, number, "3")
        for value in ("x", [1], {"class_path": "Nothing"}):
            with pytest.raises((TypeError, ValueError, KeyError, ArgumentError)):
                compat.check_value(made, number, value)


def test_jsonargparse_classes() -> None:
    with relying_on("jsonargparse", "a class has a parser of its arguments, and a path") as compat:
        made, _ = parser()
        with compat.parser_context(parent_parser=made, load_value_mode=made.parser_mode):
            own = compat.ActionTypeHint.get_class_parser(Kind, {"fail_untyped": False}, skip_args=None)
            less = compat.ActionTypeHint.get_class_parser(Kind, {"fail_untyped": False}, skip_args={1})
        named, left = ({action.dest for action in some._actions} for some in (own, less))
        assert {"size", "name"} <= named and [*compat.iter_required_keys(own)] == ["size"]
        assert "size" not in left and not [*compat.iter_required_keys(less)]
        path = f"{Kind.__module__}.Kind"
        assert compat.get_import_path(Kind) == path
        assert {path, f"{Kind.__module__}.Narrow"} <= set(compat.get_all_subclass_paths(Kind))


def test_jsonargparse_settings() -> None:
    with relying_on("jsonargparse", "settings deny imports, and come back") as compat:
        before = dict(compat.parsing_settings)
        with compat.restoring_settings():
            set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["collections"])
            assert compat.import_object("collections.Counter")
            with pytest.raises(ImportError) as caught:
                compat.import_object("fractions.Fraction")
            assert type(caught.value).__name__ == "ImportDenied"
        assert compat.parsing_settings == before


def test_jsonargparse_yaml() -> None:
    with relying_on("jsonargparse", "the loader reads 1e-3 as a number, and no Python objects") as compat:
        loader = compat.get_yaml_default_loader()
        read = loader("a: 1e-3\nb: [yes, null]")
        node = read.get_single_node()
        assert read.construct_document(node) == {"a": 1e-3, "b": [True, None]}
        assert node.value[0][1].start_mark.line == 0
        read.dispose()
        assert not [tag for tag in loader.yaml_constructors if tag and "python/object" in tag]
