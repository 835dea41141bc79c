"""fit, validate, test, predict, check: LightningCLI in subclass mode, with run folders and one-line errors."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from descant.callbacks.checkpoints.resume import Resume, Stopped, require_exact
from descant.callbacks.health.nonfinite import RollBack
from descant.cli import precision
from descant.cli.arguments import Request
from descant.cli.catalogue import BASE, run_name, with_maker
from descant.cli.check import Check, Checked
from descant.cli.document import path_to_show
from descant.cli.errors import INTERRUPTED, TERMINATED, Refusal, Unavailable, disk_fault, fail, printable, say
from descant.cli.explain import composition_warnings, inert
from descant.cli.explain import explain as explained
from descant.cli.judged import judged_data
from descant.cli.precheck import needs_check, precheck
from descant.cli.quiet import quieten
from descant.cli.signatures import Live, read_replaced
from descant.cli.trainer_parts import (
    mirror,
    purge_after,
    require_plain,
    require_port,
    substitute_run,
    with_defaults,
    with_store,
    without_enums,
)
from descant.cli.trust import enforce, writes
from descant.datamodules.changes import DataPolicy
from descant.export.loading import trust_check
from descant.modules.core.compat.launcher import SubprocessScriptLauncher
from descant.modules.core.errors import Outage, one_line
from descant.modules.core.ranks import as_batch_work
from descant.modules.io import hub
from descant.modules.io.files import write_json
from descant.modules.io.saved import policy
from descant.modules.training_setup.loggers import TensorBoard
from descant.modules.training_setup.trackers.base import Tracker
from descant.recipes.base.recipe import Recipe
from descant.report.predictions import Predictions
from descant.run import elastic, lock, runs
from descant.run.changes import of_another, require_unchanged
from descant.run.checkpoint_resolver import for_evaluation, for_fit, source_of
from descant.run.faults import explain, misfit, outside_ours, parse_fault, unbuilt
from descant.run.folder import Folder
from descant.run.garbage import freezing_long_lived_objects
from descant.run.ranks import Ended, Ranks
from descant.run.store import AtomicIO
from descant.run.threads import AUTO, Others, set_threads, trials

#: Options of a single call, which config.yaml does not store.
CALL = (
    *("config", "extends", "runs", "run", "resume", "changed", "verify", "test", "sets", "ckpt_path"),
    *("checkpoint_mirror", "threads"),
)


class Parser(LightningArgumentParser):
    """Argument parser that raises Refusal instead of exiting, and records the first class that failed to build."""

    #: The first class of the last call that could not be built, and why; the error of a union names neither.
    failed: ClassVar[tuple[type, Exception] | None] = None

    def instantiate(self, *args: Any, **kwargs: Any) -> Namespace:
        return super().instantiate(*args, **kwargs | {"instantiators": [(_building, object, True)]})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise Refusal(parse_fault(message)) from ex


def _building(cls: type, *args: Any, **kwargs: Any) -> Any:
    try:
        return cls(*args, **kwargs)
    except Exception as error:
        Parser.failed = Parser.failed or (cls, error)
        raise


class DescantCLI(LightningCLI):
    """One command, which the constructor parses, builds and runs, as in LightningCLI."""

    def __init__(self, request: Request, checking: Check | None = None) -> None:
        self.request = request
        self.checking = checking or (Check() if request.command == "check" else None)
        self.lines: list[str] = []  # printed once everything is built
        self.others = Others()
        self.ranks: Ranks | None = None
        self.command = "fit" if request.command == "check" else request.command
        super().__init__(
            Recipe,
            L.LightningDataModule,
            save_config_callback=None,
            trainer_class=precision.Trainer,
            seed_everything_default=0,
            # on the main parser, because it has no effect on a subcommand
            parser_kwargs={"allow_abbrev": False, self.command: {"default_config_files": [str(BASE)]}},
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[self.command, *request.arguments()],
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there, and called on self
        """Return the arguments that are not options, for the requested command only, since each parser costs time."""
        skip = {"model", "datamodule", "dataloaders", "weights_only"}
        skip |= {"verbose", "return_predictions"}  # Report prints the metrics, and predictions go to disk
        if self.command == "fit":
            skip |= {"train_dataloaders", "val_dataloaders", "ckpt_path"}
        return {self.command: skip}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run.")
        names = str | list[str] | None
        parser.add_argument("--extends", type=names, default=None, help="Of a file: which ones it is laid over.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument("--run", type=str | None, default=None, help="An existing run, such as NAME/002.")
        parser.add_argument("--resume", type=str, default="never", help="never, auto or a checkpoint (fit).")
        words = Literal["refuse", "allow"]
        parser.add_argument("--changed", type=words, default="refuse", help="Resume with other settings, data: allow.")
        parser.add_argument("--verify", type=bool, default=False, help="Read and hash all data before it is used.")
        parser.add_argument("--test", type=bool, default=False, help="Test the final weights after fit.")
        second = "A second place for the newest resume point: a folder or an fsspec URL."
        parser.add_argument("--checkpoint_mirror", type=str | None, default=None, help=second)
        parser.add_argument("--threads", type=str, default=AUTO, help="Threads on the CPU: auto, measure or a number.")
        if self.command == "predict":
            parser.add_argument("--sets", type=str | None, default=None, help="Of what, such as val,vendor or train.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        command, request, places = args[0], self.request, tuple[tuple[str, ...], ...]()
        if needs_check(request):
            self.walk = precheck(Live(self._parser(command)), request.files, request.options, request.trust)
            places = tuple(self.walk.classes)
        read_replaced()
        # read after the walk, which may have completed short names
        self.config = parser.parse_args([command, *request.arguments(places)])

    def _parse_ckpt_path(self) -> None:
        """Do nothing, because checkpoints hold no hyper-parameters."""

    @property
    def options(self) -> Namespace:
        """Return the configuration of the chosen subcommand."""
        return self.config[self.config["subcommand"]]

    @property
    def name(self) -> str:
        """Return the name of the run: ``--name``, or that of the first configuration."""
        default = run_name(self.request.configs[0]) if self.request.configs else self.subcommand
        return str(self.options.get("name") or default)

    def before_instantiate_classes(self) -> None:
        self.options["name"] = self.name
        if self.checking is not None:
            self.checking.prepare(self.options)
        accumulate = self.options.trainer.accumulate_grad_batches
        if isinstance(accumulate, int) and accumulate < 1:
            fail(f"trainer.accumulate_grad_batches {accumulate}: at least 1")
        if self.command == "fit" and self.request.configs and not runs.is_launched():
            for file in inert(self.request.files, self.walk.default):
                say(f"warning: --config {path_to_show(file)} changes nothing")
            for line in composition_warnings(self.request.files, self.request.options):
                say(f"warning: {line}")
        if "://" in self.options.runs:
            fail(f"--runs {self.options.runs}: a folder of this machine; --checkpoint_mirror takes an address")
        if "writes" not in self.request.trust and (self.command == "fit" or not self.options.get("run")):
            runs.require_name(self.name)
        self.place = runs.agree(Path(self.options.runs) / self.name, self._decide)
        self.options.trainer.precision = self.place.precision  # rank 0's choice, because nodes may differ
        set_threads(self.options.threads, self.place, self.options.trainer.devices, self.others, self.lines.append)
        text = self._config_text()
        if self.command != "fit" and self.place.checkpoint is not None and runs.rank() == 0:
            source = source_of(Path(self.options.runs), self.options.run, self.request.configs, self.request.trust)
            other = of_another(Path(self.place.checkpoint), source, text)
            if other is not None:
                say(f"warning: {other}")
        self.folder = Folder(self.place, text)
        if self.request.explain:
            rows = explained(yaml.safe_load(text), self.request.files, self.request.options)
            print("\n".join(map(printable, rows)), "\n")
        folder = str(self.place.folder)
        given = substitute_run(self.options.trainer.default_root_dir, folder)
        if given and self.request.command == "fit" and runs.rank() == 0:
            Path(given).mkdir(parents=True, exist_ok=True)
            lock.take(Path(given))  # logs go there, resume points to the run's folder
        self.options.trainer.default_root_dir = given or folder
        self.options["trainer"] = substitute_run(self.options.trainer, folder)

    def _config_text(self) -> str:
        """Return the text of ``config.yaml``."""
        saved = self.options.clone()
        for key in CALL:
            saved.pop(key, None)
        saved["trainer"] = without_enums(saved.trainer)
        text: str = self._parser(self.subcommand).dump(saved, skip_unset=False, skip_validation=True)
        return text

    def _decide(self) -> runs.Run:
        """Choose the folder, the checkpoint and the precision of this call, on rank 0 only."""
        precision.choose_precision(self.options.trainer)  # fails before a folder is made
        place = self._place()
        resumed = place.checkpoint if self.command == "fit" else None
        kept = runs.precision_of(Path(resumed).parent.parent) if resumed is not None else None
        try:
            self.options.trainer.precision = precision.resolve(self.options.trainer, kept, self.lines.append)
            if resumed is not None:
                require_unchanged(Path(resumed), self._config_text(), self.options.changed == "allow")
        except Refusal:
            place.discard()
            raise
        return replace(place, precision=self.options.trainer.precision)

    def _place(self) -> runs.Run:
        options, root, command = self.options, Path(self.options.runs), str(self.subcommand)
        if self.request.command == "check":
            return runs.allocate(Path(tempfile.mkdtemp(prefix="descant-")))
        if command == "fit":
            return for_fit(root, self.name, options.run, options.resume, self.request.trust)
        source = source_of(root, options.run, self.request.configs, self.request.trust)
        start = options.get("ckpt_path")
        return for_evaluation(command, root, self.name, source, start, self.request.trust, self.lines.append)

    def instantiate_classes(self) -> None:
        Parser.failed = None
        folder, start = self.place.folder, self.place.checkpoint
        known = folder if start is None or (folder / hub.RECORD).is_file() else Path(start).parent.parent
        with (
            hub.pinning_revisions(known),
            self.checking.building() if self.checking is not None else contextlib.nullcontext(),
        ):
            super().instantiate_classes()
            if self.subcommand != "fit" and self.options.run:
                self.datamodule = judged_data(self.request, self.datamodule, self.trainer, start)
        if self.subcommand == "fit" and runs.rank() == 0 and (taken := hub.record()):
            write_json(folder / hub.RECORD, taken)  # before other ranks start, because they read it
        for line in self.lines:  # only now, so that a failed build prints only its own line
            say(line)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        # Folder first: config.yaml is written before anything else
        ours = with_defaults(config.get("callbacks"), self.model, config.get("enable_progress_bar"))
        config["callbacks"] = [self.folder, *trials(self.options.threads, self.place.folder, say), *ours]
        if self.subcommand == "fit":
            resumed = any(isinstance(callback, Resume) for callback in config["callbacks"])
            require_exact(config["callbacks"], resumed)
        if self.subcommand == "predict":
            sets = str(self.options.get("sets") or "").split(",")
            config["callbacks"].append(Predictions(self.place, [name.strip() for name in sets if name.strip()]))
        if self.subcommand == "fit" and not self.place.fresh:
            purge_after(config.get("logger"), self.place.checkpoint)
        if self.checking is not None or self.subcommand == "predict":  # they log nothing that a tracker should list
            given = config.get("logger")
            config["logger"] = [x for x in given if not isinstance(x, Tracker)] if isinstance(given, list) else given
        config["plugins"] = with_store(config.get("plugins"))
        if not ("writes" in self.request.trust or any(writes(*option) for option in self.request.typed_options)):
            for plugin in config["plugins"]:
                if isinstance(plugin, AtomicIO):
                    plugin.inside = self.place.folder
        if self.command == "fit" and self.checking is None:
            mirror(config["plugins"], self.options.checkpoint_mirror, f"{self.name}/{self.place.folder.name}")
        if self.checking is not None:
            config |= self.checking.trainer(config)
        trainer = super()._instantiate_trainer(config, callbacks)
        assert isinstance(trainer, precision.Trainer)
        trainer.data_policy = DataPolicy(self.options.changed == "allow", bool(self.options.verify))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoard):
                logger.monitor(trainer.checkpoint_callbacks)
        cluster = trainer._accelerator_connector.cluster_environment
        if trainer.world_size > 1 and isinstance(cluster, LightningEnvironment) and not runs.is_launched():
            require_port(os.environ.get("MASTER_PORT"))
        if isinstance(cluster, SLURMEnvironment):
            cluster.auto_requeue = False  # it saves in the signal handler, and a slow rank then waits for ever
        if trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
            as_batch_work()
        launcher = trainer.strategy.launcher
        if isinstance(launcher, SubprocessScriptLauncher):
            self.ranks = Ranks(launcher, self.place.folder, (Stopped, RollBack), lambda: clear(self))
            launcher.launch = self.ranks.launch  # type: ignore[method-assign]  # Lightning's leaves ranks running
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand != "fit":  # Report prints metrics; predictions go to disk
            kwargs |= {"return_predictions": False} if subcommand == "predict" else {"verbose": False}
        require_plain(self.trainer.strategy, self.place.checkpoint)
        return {**kwargs, "ckpt_path": self.place.checkpoint, "weights_only": True}

    def fit(self, **kwargs: Any) -> None:
        """Run ``Trainer.fit``, and again from an earlier resume point whenever a callback raises RollBack."""
        while True:
            try:
                with freezing_long_lived_objects():
                    return self.trainer.fit(**kwargs)
            except RollBack as back:
                kwargs["ckpt_path"] = str(back.path)
                for logger in self.trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger._experiment = None  # the next writer purges the undone steps
                purge_after(self.trainer.loggers, back.path)

    def after_fit(self) -> None:
        if self.options.test and not self.trainer.interrupted:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


class _Parsed(Exception):
    """Raised once the parser exists."""


class _ParserOnly(DescantCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _Parsed


def live(command: str) -> Live:
    """Build the schema of a command from its own parser."""
    cli = _ParserOnly.__new__(_ParserOnly)
    with contextlib.suppress(_Parsed):
        cli.__init__(Request(command))  # type: ignore[misc]
    return Live(cli._parser(command))


def _with_point(line: str, place: runs.Run) -> str:
    point, _ = runs.newest_point(place.folder)
    return line if point is None else f"{line}; --resume auto goes on from {point.name}"


@contextlib.contextmanager
def _quiet_writer_threads() -> Iterator[None]:
    """Silence an OSError in TensorBoard's writer thread, which raises it again at the next call."""
    before = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not isinstance(raised.exc_value, OSError):
            before(raised)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def run(request: Request, checking: Check | None = None) -> int:
    """Run one command and return its exit code. ``checking``: called by a check at the first batch."""
    quieten()
    enforce(request.trust)
    hub.forget()
    elastic.own_store()
    if request.trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a trusted module is usually a local file; last, so that it shadows none
    cli = DescantCLI.__new__(DescantCLI)
    fault = None
    try:
        code = _run_command(cli, request, checking)
        fault = cli.ranks.join() if cli.ranks is not None else None
    finally:
        release(cli)
    return _exit_code(fault) if fault is not None and code == 0 else code


def release(cli: DescantCLI) -> None:
    """End the ranks that a call started, then :func:`clear`; the command line may be half built."""
    ranks: Ranks | None = getattr(cli, "ranks", None)
    if ranks is not None:
        ranks.kill()  # does nothing if they have ended
    clear(cli)


def clear(cli: DescantCLI) -> None:
    """Release locks and the environment, and remove the folder of a run that never started."""
    runs.forget()
    lock.release()
    started, folder = getattr(cli, "folder", None), getattr(cli, "place", None)
    checked = getattr(cli, "checking", None) is not None  # its folder is temporary
    if started is not None and folder is not None and (checked or not started.began):
        folder.discard()


def _exit_code(fault: Ended) -> int:
    if fault.line:
        say(fault.line)
    return fault.code


def _run_command(cli: DescantCLI, request: Request, checking: Check | None = None) -> int:
    """Build and run one command; return its exit code."""
    try:
        with (
            policy(trust_check(request.trust)),
            hub.allowing_downloads("hub" in request.trust),
            _quiet_writer_threads(),
        ):
            cli.__init__(request, checking)  # type: ignore[misc]  # in two steps: release() needs what is half built
    except Refusal:
        raise
    except Ended as fault:
        return _exit_code(fault)
    except Stopped as stop:
        if cli.trainer.is_global_zero:
            say(f"{stop}; --resume auto goes on there")
        # the rank that launched this one gives the exit code
        return 0 if runs.is_launched() else stop.code
    except Checked:
        print("\n".join(cli.checking.lines) if cli.checking else "")
    except SystemExit as stop:
        trainer = getattr(cli, "trainer", None)
        if trainer is not None and trainer.received_sigterm:
            return TERMINATED
        return INTERRUPTED if trainer is not None and trainer.interrupted else int(stop.code or 0)
    except Exception as error:
        trainer, place = getattr(cli, "trainer", None), getattr(cli, "place", None)
        if isinstance(error, Outage) and not request.debug:
            raise Unavailable(_with_point(one_line(error), cli.place)) from error
        line = disk_fault(error, place.folder) if place is not None else None
        line = line and _with_point(line, cli.place)
        if trainer is None and Parser.failed is not None:
            line = line or unbuilt(*Parser.failed, request.trust)
        line = line or explain(error, building=trainer is None, trust=request.trust)
        begun = trainer is not None and trainer.state.fn == "fit" and trainer.global_step > 0
        if line is None and trainer is not None and (cli.checking is not None or not begun):
            line = misfit(error, cli.model, request.trust) or outside_ours(error, request.trust)
        if line is None or request.debug:
            raise
        raise Refusal(with_maker(line)) from error
    return 0
