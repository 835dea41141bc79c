"""Allow-list of the classes that a configuration may name, checked before any import.

A configuration is data. Naming ``os.system`` in it must not run it, and must not even import the module.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from descant.cli.errors import Refusal
from descant.modules.io.addresses import expand

#: Where the classes that a configuration builds may come from. PERMITTED narrows it by the kind expected at a place.
ALLOWED = (
    *("descant", "torch.nn", "torch.optim", "torchvision.transforms.v2", "bitsandbytes.optim"),
    *("timm.optim.Lion", "timm.optim.lion.Lion", "schedulefree"),
    *("lightning.pytorch", "lightning.fabric.plugins", "lightning.fabric.accelerators", "lightning.fabric.strategies"),
    *("torch.device", "torch.dtype", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64", "torch.amp"),
    *("torch.distributed.fsdp", "torch.distributed.device_mesh"),
)
#: Public name -> where it is defined, which the parser checks too; both are in DENIED.
_DEFINED = {
    "descant.modules.policy.VerifierProcess": "descant.modules.policy.rewards.VerifierProcess",
    "lightning.pytorch.callbacks.LambdaCallback": "lightning.pytorch.callbacks.lambda_function",
    "torchvision.transforms.v2.Lambda": "torchvision.transforms.v2._misc.Lambda",
    "lightning.pytorch.strategies.DeepSpeedStrategy": "lightning.pytorch.strategies.deepspeed.DeepSpeedStrategy",
}
_IO = ("AsyncCheckpointIO", "CheckpointIO", "TorchCheckpointIO", "XLACheckpointIO")
#: Parts of ALLOWED that start processes, load code, write to any path, build any class by its name, or only call
#: their arguments.
DENIED = (
    *("descant.cli.main", "descant.__main__", "descant.load", "descant.fit", "descant.cli.python", "descant.Embedder"),
    *("descant.export.loading", "descant.export.export", "descant.datamodules.sources.hub"),
    *("descant.run.folder", "descant.report.predictions", "descant.cli.check"),
    *("descant.run.processes", *_DEFINED, *_DEFINED.values()),
    *("lightning.pytorch.cli", "lightning.pytorch.core.saving", "lightning.pytorch.demos", "lightning.pytorch.tuner"),
    # these write checkpoints to any path; AtomicIO does not
    *("lightning.fabric.plugins.io", "lightning.pytorch.plugins.io", "lightning.fabric.strategies.deepspeed"),
    *(f"lightning.{package}.plugins.{name}" for package in ("fabric", "pytorch") for name in _IO),
    "schedulefree.algoperf",
    *("torch.optim.lr_scheduler.LambdaLR", "torch.optim.lr_scheduler.MultiplicativeLR"),
)
#: Kind -> where its classes may come from, for kinds with many classes that do not belong in a run. Classes of other
#: kinds may come from all of ALLOWED.
PERMITTED = {
    "torch.nn.modules.module.Module": ("descant", "torch.nn", "torchvision.transforms.v2"),
    "torch.optim.optimizer.Optimizer": (
        *("descant", "torch.optim", "bitsandbytes.optim"),
        *("timm.optim.Lion", "timm.optim.lion.Lion", "schedulefree"),
    ),
    "lightning.pytorch.core.module.LightningModule": ("descant.recipes",),
    "lightning.pytorch.core.datamodule.LightningDataModule": ("descant.datamodules",),
    "lightning.pytorch.callbacks.callback.Callback": ("descant.callbacks", "lightning.pytorch.callbacks"),
    "lightning.pytorch.loggers.logger.Logger": (
        "descant.modules.training_setup.loggers",
        "descant.modules.training_setup.trackers",
        "lightning.pytorch.loggers",
    ),
}

#: Words that ``--trust`` accepts besides modules -> what each then allows configuration files to do.
WORDS = {
    "shell": "run commands in a shell",
    "packages": "believe packages whose hash is not known",
    "writes": "write outside the run's folder",
    "network": "reach another machine",
    "reads": "read files outside the folder of a table",
    "hub": "download models from a hub",
}
#: Key -> the word that a file needs to set it. On the command line the user sets it.
_GUARDED = {"allow_pipes": "shell", "accept": "packages", "model_registry": "network", "outside": "reads"}
#: Classes whose purpose is to reach another machine.
_REMOTE = ("CometLogger", "LitLogger", "MLFlowLogger", "NeptuneLogger", "WandbLogger")
#: An address, except that of a file; a pipe is allowed by its own key.
_ADDRESS = re.compile(r"\s*((?!file:/|pipe:)([a-z][a-z0-9+.-]+:+)+/|(https?|s3|gs):\S)", re.IGNORECASE)
#: Keys that set where to write: below the run's folder, RUN, or a name in it.
_PLACES = (
    *("dirpath", "save_dir", "log_dir", "root_dir", "default_root_dir", "cache", "cache_dir", "store_dir"),
    *("exclude_batches_path", "nvme_path", "tracking_uri", "offline_directory", "checkpoint_mirror"),
)
#: The same for some classes, whose keys mean other things elsewhere.
_PLACES_OF = {"Resume": "folder", "Freeze": "folder", "Cached": "folder", "WandbLogger": "dir"}
_NAMES = ("name", "version", "sub_dir", "filename", "runs", "run", "comment", "filename_suffix")
#: What braces in a name may hold: a metric, and its number of digits.
_BRACES = re.compile(r"\{[^{}]*\}?|\}")
_FIELD = re.compile(r"\{(?!.*\.\.)[\w@][\w/@. -]*(:0?\d{0,2}(\.\d{1,2})?[defg]?)?\}|\{\}")
_trusted: set[str] = set()


def is_allowed(path: str, trust: Sequence[str] = ()) -> bool:
    """Whether a class path lies in an allowed package and in no denied part of it; the longest entry decides.

    >>> [is_allowed(path) for path in ("torch.optim.AdamW", "torch.hub.load", "os.system")]
    [True, False, False]
    >>> is_allowed("os.system", ["os"])
    True
    """
    verdicts = {**dict.fromkeys(ALLOWED, True), **dict.fromkeys(DENIED, False)}
    verdicts |= {name: True for name in trust if name not in WORDS}
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        entry = ".".join(parts[:n])
        if entry in verdicts:
            return verdicts[entry]
    return False


def require(path: str, trust: Sequence[str] = ()) -> None:
    """Raise Refusal if a class path is outside the allow-list."""
    if is_allowed(path, trust):
        return
    part = next((denied for denied in DENIED if within(path, [denied])), None)
    if part is not None:
        place = "" if part == path else f" in {part},"
        why = "may load code, write elsewhere or start processes"
        raise Refusal(f"class_path {path} is{place} one that {why}: --trust {part} if you trust it")
    top = path.split(".")[0]
    raise Refusal(f"class_path {path} is outside the allow-list ({', '.join(ALLOWED)}): --trust {top} if you trust it")


def require_kind(path: str, kinds: Sequence[str], trust: Sequence[str] = ()) -> None:
    """Raise Refusal for a class of an expected kind that PERMITTED does not allow for this kind.

    Args:
        path: path of the class. kinds: full names of the expected kinds; the class is of one of them.

    >>> require_kind("torch.nn.Linear", ["torch.nn.modules.module.Module"])
    """
    if is_named(path, trust) or any(kind not in PERMITTED for kind in kinds):
        return
    places = sorted({place for kind in kinds for place in PERMITTED[kind]})
    if not within(path, places):
        top = path.split(".")[0]
        raise Refusal(f"class_path {path}: here only what is of {', '.join(places)}: --trust {top} if you trust it")


def is_named(path: str, trust: Sequence[str]) -> bool:
    """Whether --trust names this object or a module that contains it.

    >>> is_named("mine.parts.Tower", ["mine"]), is_named("minerva.Tower", ["mine"]), is_named("torch.nn.Linear", [])
    (True, False, False)
    """
    return within(path, [name for name in trust if name not in WORDS])


def within(path: str, places: Iterable[str]) -> bool:
    """Whether a dotted path is one of these or lies below it.

    >>> within("torch.nn.Linear", ["torch.nn"]), within("torch.nnx", ["torch.nn"])
    (True, False)
    """
    return any(path == place or path.startswith(f"{place}.") for place in places)


def guard(key: str, value: Any, trust: Sequence[str] = (), of: Any = None) -> None:
    """Raise Refusal for keys that a file may not set without --trust: shell commands, packages, writes elsewhere.

    Args:
        of: the class whose argument it is, as the file calls it.

    >>> guard("dirpath", "RUN/checkpoints"), guard("allow_pipes", False), guard("dirpath", "/etc", ["writes"])
    (None, None, None)
    """
    key = key.removesuffix("+").rpartition(".")[2]
    word, why = _GUARDED.get(key), "" if value in (None, False, []) else "a file may not set that"
    if key == "offline" and value is False:
        word, why = "network", "offline: false sends the run to another machine"
    remote = _remote(key, value)
    if remote is not None:
        word, why = "network", f"{remote} is not on this machine"
    parts = PurePath(value).parts if isinstance(value, str) else ()
    leaves = bool(parts) and (".." in parts or PurePath(*parts).is_absolute() or parts[0].startswith("~"))
    if (key in _PLACES or _PLACES_OF.get(str(of).rpartition(".")[2]) == key) and parts:
        word, why = "writes", "" if parts[0] == "RUN" and not leaves else f"{value} is outside the run's folder, RUN"
    elif key == "strategy" and str(value).startswith("deepspeed"):  # it compiles code, and offloads to any disk
        word, why = "writes", f"{value} writes outside the run's folder"
    elif key in _NAMES and parts:
        text = str(value)  # a quote would end a name in a job's script; formats can make any letter
        odd = not text.isprintable() or '"' in text or any(not _FIELD.fullmatch(one) for one in _BRACES.findall(text))
        why = f"{value} leads out of the run's folder" if leaves else "no letter of a name" if odd else ""
        word = "writes"
    if word is not None and why and word not in trust:
        raise Refusal(f"{why}: --trust {word} lets a configuration {WORDS[word]}; an option may set it, too")


def writes(key: str, value: str | None) -> bool:
    """Whether an option sets where to write; then the user decides that, not a file.

    >>> writes("trainer.callbacks.dirpath", "/scratch"), writes("model.width", "8")
    (True, False)
    """
    words = {*_PLACES, *_PLACES_OF.values(), "filename"}
    return key.rpartition(".")[2] in words or any(word in (value or "") for word in words if len(word) > 6)


def _remote(key: str, value: Any) -> str | None:
    """Return the part of a value that is on another machine."""
    if key == "class_path":
        name = str(value).rpartition(".")[2]
        return f"what {name} writes to" if name in _REMOTE else None
    if isinstance(value, list):
        return next((found for item in value if (found := _remote("", item)) is not None), None)
    return next(filter(_ADDRESS.match, _expand_addresses(value)), None) if isinstance(value, str) else None


def _expand_addresses(text: str) -> list[str]:
    """Return the addresses that a reader would open; a text whose braces no reader expands is returned unchanged."""
    try:
        return expand(text) if ":" in text else [text]
    except ValueError:
        return [text]


def _defining_path(name: str) -> str:
    """Return the defining path of a class, which the parser checks too."""
    try:
        value = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return name
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else name


def enforce(trust: Sequence[str] = ()) -> None:
    """Give jsonargparse the same list, as a second check."""
    from jsonargparse import set_parsing_settings

    trust = [*trust, *(_defining_path(name) for name in trust if name in DENIED)]
    forgotten = sorted(_trusted - set(trust))  # settings are global: deny what only an earlier call trusted
    try:
        set_parsing_settings(
            import_path_denylist=["*", *DENIED, *forgotten],
            import_path_allowlist=[*ALLOWED, *(name for name in trust if name not in WORDS)],
            instantiate_subclass_spec_in_any=False,
        )
    except ValueError as error:  # such as jsonargparse itself, by which anything could be made
        raise Refusal(f"--trust {' '.join(trust)}: {' '.join(str(error).split())}") from None
    _trusted.update(trust)
