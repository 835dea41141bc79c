"""A table of hostile inputs: (way in) x (what somebody wrote there), and a canary that sees what comes of each.

A way in plants a file that somebody else made and says which command, or which reader, the user then calls. Each has to
be one line and exit code 2 (or to do nothing, where ``fine``): no process, no connection, no file elsewhere.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from descant.claims import run
from descant.cli.errors import Refusal
from descant.modules.io.cache import cache_folder
from descant.modules.towers import PretrainedTower
from descant.run.faults import unbuilt
from descant.run.processes import Task
from descant.slurm import sweep
from tests.conftest import TRUST, Result, captured

Call = Callable[[], Any]
#: A file whose appearance shows that a command ran; an address that nobody may ask; a place where nobody may write.
MARK, PORT, ELSEWHERE = "ran", 9, "/tmp/hostile-elsewhere"


@dataclass(frozen=True)
class Case:
    """``plant`` writes files into the working folder and returns words of ``descant``, or a call of a reader.

    Attributes:
        name: way in and payload. fine: whether it may also succeed, without an effect.
    """

    name: str
    plant: Callable[[], list[str] | Call]
    fine: bool = False


# the canary ---------------------------------------------------------------------------------------------------------

_watched: list[list[str]] = []
_QUIET = ("__pycache__", "/dev/", "/proc/", "/sys/")
#: Programs that Descant asks about itself and the machine.
_OWN = ("git", "lscpu", "nvidia-smi")


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in ("os.system", "os.exec", "os.posix_spawn", "pty.spawn") or (
        event == "subprocess.Popen" and not _is_own(list(args[1] or [args[0]]))
    ):
        _watched[-1].append(f"{event} {args!r}"[:200])
    elif event in ("socket.connect", "socket.getaddrinfo", "urllib.Request", "http.client.connect"):
        _watched[-1].append(f"{event} {args[-1]!r}"[:200])
    elif event == "open" and isinstance(args[0], str | bytes) and _writes(args[1], args[2]):
        _watched[-1].append(f"writes {os.fsdecode(args[0])}")
    elif event in ("os.remove", "os.rmdir") and args[1] >= 0:
        return  # below a folder whose shutil.rmtree was seen
    elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"):
        places = args[:2] if event in ("os.rename", "os.link") else args[1:2] if event == "os.symlink" else args[:1]
        _watched[-1] += [f"writes {os.fsdecode(os.fspath(at))}" for at in places if isinstance(at, str | bytes | Path)]


def _is_own(command: list[Any]) -> bool:
    return (
        Path(str(command[0])).name in _OWN
        or (command[1:2] == ["-c"] and "sys.path" in command[2])
        or (command[1:] == ["-P", "-m", "descant.cli.dump"])
    )


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


sys.addaudithook(_hook)


@contextmanager
def canary(*allowed: Path) -> Iterator[list[str]]:
    """Collect what nothing hostile may bring about: processes, connections, and writes elsewhere than ``allowed``."""
    seen: list[str] = []
    _watched.append(seen)
    try:
        yield seen
    finally:
        _watched.pop()
        roots = [place.resolve() for place in allowed]
        seen[:] = [one for one in seen if not (one.startswith("writes ") and _inside(one[7:], roots))]


def _inside(name: str, roots: list[Path]) -> bool:
    if name == "." or any(part in name for part in _QUIET) or name.startswith(f"{tempfile.gettempdir()}/descant-"):
        return True
    path = Path(name).parent.resolve() / Path(name).name
    return any(path.is_relative_to(root) for root in roots)


#: Lines that a command prints on its way.
_TOLD = ("warning", "skipped", "resuming", "claims evil: exact: no test", "claims evil: 9 runs", "claims evil: 12 runs",
         "sweep: 2 runs", "validate uses", "predict uses", "no --ckpt_path",
         "saved by", "--resume auto: ")  # fmt: skip


def begin_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have claims and sweeps run their commands in this process, where the canary sees them."""

    def run_here(tasks: Sequence[Task], *_: object, **__: object) -> None:
        for task in tasks:
            for words in filter(None, (task.words, task.then)):
                done = captured(*words)
                assert done.rc in (0, 2) and "Traceback" not in done.err, done.err
                if done.rc:
                    raise Refusal(f"{task.label}: {done.err.strip().splitlines()[-1]}")

    for module in (run, sweep):
        monkeypatch.setattr(module, "run_beside", run_here)


def outcome(case: Case) -> str | None:
    """What is wrong with how an input ends; None where it does nothing and is told in one line."""
    workplace = Path.cwd()
    for path in workplace.iterdir():
        if path.name != "toy.yaml":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    spot = case.plant()
    allowed = [workplace / name for name in ("runs", "out", "results", "CLAIMS.md", "report.html")]
    allowed += [cache_folder(), *workplace.glob(".out*"), workplace / "scratch"]
    allowed += [workplace / f".{name}.{os.getpid()}" for name in ("out", "report.html")]  # until they are whole
    with canary(*allowed) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            done = captured(*spot) if isinstance(spot, list) else _called(spot)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"[:300]
    if seen:
        return f"it did {seen[:3]}"
    if (workplace / MARK).exists() or Path(ELSEWHERE).exists():
        return "its mark is there"
    lines = [line for line in done.err.splitlines() if not line.removeprefix("descant: ").startswith(_TOLD)]
    lines = [line for line in lines if "the run's own: --" not in line]  # what differs from it, one line each
    if done.rc == 0 and case.fine:
        return None
    if done.rc != 2 or len(lines) != 1 or "Traceback" in done.err:
        return f"rc {done.rc}, {len(lines)} lines: {done.err[-300:]!r}"
    return None


def _called(call: Call) -> Result:
    err = StringIO()
    try:
        with redirect_stderr(err):
            call()
    except Exception as error:
        text = str(error) if isinstance(error, ValueError | OSError | Refusal) else unbuilt(PretrainedTower, error)
        if text is None:
            raise
        return Result(2, "", text if len(text.splitlines()) == 1 else f"{text!r}\nmore lines")
    return Result(0, "", "")


# what somebody wrote ------------------------------------------------------------------------------------------------

HOST = f"127.0.0.1:{PORT}"
JUDGE = {"class_path": "VerifierProcess", "init_args": {"program": f"open('{MARK}', 'w')", "seconds": 1}}
#: Texts that are an address on another machine once their braces are expanded, as a reader would.
ADDRESSES: list[Any] = [
    *(f"http://{HOST}/a.tar", f"{{h,H}}ttp://{HOST}/a.tar", f"http{{,}}://{HOST}/a", f"{{http,}}://{HOST}/{{0..9}}"),
    *(f"ht\\tp{{,}}://{HOST}/a", f"http:/{HOST}/a", f"http:{HOST}/a.tar", f"HTTP://{HOST}/a", "{s3,gs}://bucket/a"),
    *(f"http:{{/,}}/{HOST}/a", f"http{{:,}}//{HOST}/a", f"simplecache::http://{HOST}/a", f"{{a,http://{HOST}/b}}"),
    *([f"http://{HOST}/a"], ["a.tar", f"{{h,H}}ttp://{HOST}/a"], [f"h{{t,}}tp://{HOST}/a"], f"{{{{h}},h}}ttp://{HOST}"),
    *("gs://b/{0..9}", f"\thttp://{HOST}/a", f" {{h,}}ttps://{HOST}/a", f"memory://{HOST}"),
]
BOMBS = ["{0..999}{0..999}{0..999}.tar", "{1..99999999999}", "{{0..999}{0..999}{0..999},x}", "{" * 4000 + "}" * 4000]


def stream(urls: Any, **more: Any) -> dict[str, Any]:
    """Options by which a table of samples is read from addresses."""
    return {"data": {"class_path": "UserData", "init_args": {"batch_size": 8, "stream": {
        "class_path": "Stream", "init_args": {"urls": urls, "samples": 8, **more}}}}}  # fmt: skip


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"trainer.callbacks+": {"class_path": name, "init_args": arguments}}


def logger(name: str, **arguments: Any) -> dict[str, Any]:
    return {"trainer.logger": {"class_path": name, "init_args": arguments}}


def schedule(name: str, **arguments: Any) -> dict[str, Any]:
    node = {"class_path": name, "init_args": arguments}
    return {"model.init_args.schedule": {"class_path": "TorchSchedule", "init_args": {"scheduler": node}}}


def evil() -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind -> options (dotted keys) that run, fetch, upload or write elsewhere where the user says them."""
    for number, urls in enumerate(ADDRESSES):
        yield f"address {number}", stream(urls)
    for number, urls in enumerate(BOMBS):
        yield f"bomb {number}", stream(urls)
    for pipe in (
        f"pipe:touch {MARK}",
        f"{{p,P}}ipe:touch {MARK}",
        ["a.tar", f"pipe:touch {MARK}"],
        f"PIPE:touch {MARK}",
    ):
        yield f"pipe {pipe}", stream(pipe, allow_pipes=True)
    yield "pipe apart", stream(f"pipe:touch {MARK}") | {"data.init_args.stream.init_args.allow_pipes": True}
    yield "pipe unallowed", stream(f"pipe:touch {MARK}")
    for key in ("trust", "trust+", "config", "extends", "of-file", "explain", "debug", "print_config", "help"):
        yield key, {key: "evilmod"}
        yield f"{key} and a class", {key: "evilmod", "model.init_args.text": {"class_path": "evilmod.Tower"}}
    for key in ("model.help", "model.init_args.text.help", "data.help", "trainer.callbacks.help"):
        yield key, {key: "evilmod.Tower"}
    yield "trust=", {"trust=evilmod": 1}
    yield "trust newline", {"a\n--trust": "evilmod"}
    for path in ("evilmod.Tower", "os.system", "subprocess.Popen", "builtins.open", "torch.hub.load", "descant.load",
                 "descant.run.processes.run_beside", "descant.cli.trust.enforce", "torch.jit.load"):  # fmt: skip
        yield path, {"model.init_args.text": {"class_path": path, "init_args": {"command": f"touch {MARK}"}}}
    yield "judge", {"trainer.callbacks+": JUDGE}
    yield "lambda", schedule("LambdaLR", lr_lambda=JUDGE)
    yield "function", schedule("CyclicLR", base_lr=0.1, max_lr=1, scale_fn="torch.load")
    yield "dict_kwargs", {"trainer.callbacks+": {"class_path": "EarlyStopping", "dict_kwargs": {"x": JUDGE}}}
    yield "hook", {"trainer.strategy": {"class_path": "DDPStrategy", "init_args": {"ddp_comm_hook": JUDGE}}}
    yield (
        "accept",
        {"data": {"class_path": "Fashion", "init_args": {"batch_size": 8, "deb": "x.deb", "accept": ["aa"]}}},
    )
    for name, arguments in {
        "WandbLogger": {"project": "x"}, "CometLogger": {"api_key": "x"}, "NeptuneLogger": {"api_key": "x"},
        "MLFlowLogger": {"tracking_uri": f"http://{HOST}"}, "TensorBoardLogger": {"save_dir": f"s3://{HOST}/x"},
        "CSVLogger": {"save_dir": ELSEWHERE},
    }.items():  # fmt: skip
        yield name, logger(name, **arguments)
    for place in (ELSEWHERE, "../../x", "~/x", "RUN/../../x", f"file://{ELSEWHERE}", "memory://x"):
        yield f"dirpath {place}", callback("ModelCheckpoint", dirpath=place)
        yield f"Resume {place}", callback("Resume", folder=place)
        yield f"root {place}", {"trainer.default_root_dir": place}
        yield f"mirror {place}", {"checkpoint_mirror": place}
        yield f"runs {place}", {"runs": place}
        yield f"name {place}", {"name": place}
        yield f"run {place}", {"run": place}
    for text in ("{../x}", "{step:/>6}", "{step:c}", "/etc/x", "../../x"):
        yield f"filename {text}", callback("ModelCheckpoint", filename=text)
    for name in ("AsyncCheckpointIO", "TorchCheckpointIO"):
        yield name, {"trainer.plugins": [name]}
    yield "deepspeed", {"trainer.strategy": "deepspeed_stage_3_offload_nvme"}
    yield "registry", {"trainer.model_registry": "me/model"}
    yield "hub", {"model.init_args.text": {"class_path": "TransformersTower", "init_args": {"folder": "hub:a/b"}}}
    yield "profiler", {"trainer.profiler": {"class_path": "AdvancedProfiler", "init_args": {"dirpath": ELSEWHERE}}}


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted options as a file has them."""
    content: dict[str, Any] = {}
    for key, value in options.items():
        *path, last = key.split(".")
        at = content
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return content


#: Values of types that nobody expects at a key.
ODD: dict[str, Any] = {
    "date": datetime.date(2026, 1, 2),
    "time": datetime.datetime(2026, 1, 2, 3, 4, 5),
    "hex": int("f" * 400, 16),
    "digits": 16**5000,
    "negative": -(10**400),
    "bytes": b"\xff\x00",
    "set": {"a", "b"},
    "nan": float("nan"),
    "infinite": float("inf"),
    "list": [[[1]]],
    "mapping": {"a": {"b": None}},
    "dated key": {datetime.date(2026, 1, 2): 1},
    "number key": {1: {2: 3}},
    "true": True,
    "null": None,
    "empty": "",
    "long": "x" * 5000,
    "control": "a\x1b[31m\nb\u202e",
    "path": "../../../etc/passwd",
}


def written(value: Any) -> str:
    """YAML of a value; of numbers too long for a decimal text in base 16."""
    dumper: Any = type("Dumper", (yaml.SafeDumper,), {})
    dumper.add_representer(int, lambda self, n: self.represent_scalar("tag:yaml.org,2002:int", f"{n:#x}"))
    return yaml.dump(value, Dumper=dumper, allow_unicode=True, sort_keys=False)


def put(name: str, value: Any) -> Path:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else written(value), encoding="utf-8", errors="surrogatepass")
    return file


# ways in ------------------------------------------------------------------------------------------------------------

OVER = ("--config", "toy.yaml", "--config")
CLAIM: dict[str, Any] = {
    "title": "a claim of somebody", "seed": 99, "source": "a planted effect", "experiment": "toy.yaml",
    "arms": {"baseline": {"options": {"model.init_args.optimizer.init_args.lr": 0.0}}, "method": None, "sham": None},
    "metric": {"name": "test/gap", "better": "lower", "margin": 0.01, "unit": "of it", "reason": "a toy"},
    "seeds": {"pilot": [100, 101, 102], "full": [0, 1, 2, 3, 4]}, "budget": {"equal": "steps"}, "removes": "a rate",
    "no_simple": "none is", "exploratory": "somebody else's",
}  # fmt: skip


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The content with another value at a path."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(content, list):
        return [replaced(item, rest, value) if n == key else item for n, item in enumerate(content)]
    inner = content if isinstance(content, dict) else {}
    return {**inner, key: replaced(inner.get(key), rest, value)}


def paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a content."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def of_file(command: str, *words: str) -> Callable[[dict[str, Any]], list[str]]:
    def plant(options: dict[str, Any]) -> list[str]:
        put("x.yaml", nested(options))
        return [command, *words, *OVER, "x.yaml", *TRUST]

    return plant


def of_extends(options: dict[str, Any]) -> list[str]:
    put("below/y.yaml", nested(options))
    put("x.yaml", {"extends": "below/y.yaml"})
    return ["check", *OVER, "x.yaml", *TRUST]


def of_claim(*path: str, **more: Any) -> Callable[[dict[str, Any]], list[str]]:
    """Options at a place of a claim; where the place is ``config``, as a configuration."""

    def plant(options: dict[str, Any]) -> list[str]:
        value = nested(options) if path[-1] == "config" else options
        put("evil.yaml", replaced({**CLAIM, **more}, path, value))
        return ["claims", "run", "./evil.yaml", "--budget", "pilot", "--results", "results", *TRUST]

    return plant


def of_slurm_claim(options: dict[str, Any]) -> list[str]:
    put("evil.yaml", replaced(CLAIM, ("arms", "baseline", "options"), options))
    words = ["claims", "run", "./evil.yaml", "--budget", "pilot", "--results", "results", *TRUST]
    return [*words, "--slurm", "--time 60 --dry-run"]


def of_sweep(options: dict[str, Any]) -> list[str]:
    put("x.yaml", nested(options))
    return ["sweep", "--config", "toy.yaml", "--config", "x.yaml", *TRUST, "--vary", "trainer.max_epochs=1,2"]


def of_submit(options: dict[str, Any]) -> list[str]:
    put("x.yaml", nested(options))
    return ["submit", "--time", "60", "--dry-run", "--", "fit", *OVER, "x.yaml", *TRUST]


def of_plan(options: dict[str, Any]) -> list[str]:
    put("x.yaml", nested(options))
    return ["plan", "--gpu", "h100", "--", "fit", *OVER, "x.yaml", *TRUST]


def of_run(*words: str) -> Callable[[dict[str, Any]], list[str]]:
    """A run's folder whose saved configuration says it."""

    def plant(options: dict[str, Any]) -> list[str]:
        stranger()
        put("runs/a/001/config.yaml", laid(yaml.safe_load(Path("runs/a/001/config.yaml").read_text()), nested(options)))
        return [*words, *TRUST]

    return plant


def laid(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict) or "class_path" in above:
        return above
    return below | {key: laid(below.get(key), value) for key, value in above.items()}


#: A run that was trained once, copied for each case: the harness puts it there.
TEMPLATE = "template"


def stranger() -> None:
    shutil.rmtree("runs", ignore_errors=True)
    shutil.copytree(Path("..") / TEMPLATE, "runs", symlinks=True)


#: Way in -> what plants options there.
WAYS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "a configuration": of_file("check"),
    "explained": of_file("check", "--explain"),
    "trained": of_file("fit"),
    "extends": of_extends,
    "arm": of_claim("arms", "method", "options"),
    "arm config": of_claim("arms", "method", "config"),
    "claim options": of_claim("options"),
    "claim lock-box": of_claim("lockbox"),
    "before": of_claim("before", "options", before={"experiment": "toy.yaml"}),
    "before config": of_claim("before", "config", before={"experiment": "toy.yaml"}),
    "arm on a cluster": of_slurm_claim,
    "sweep": of_sweep,
    "submit": of_submit,
    "plan": of_plan,
    "validated run": of_run("validate", "--run", "a/001"),
    "resumed run": of_run("fit", "--run", "a/001", "--resume", "auto"),
    "predicted run": of_run("predict", "--run", "a/001"),
}
#: Kinds that do nothing where the data are not read, or are the name of a folder below the working folder.
_HARMLESS = (
    "bomb",
    "pipe unallowed",
    *(f"{key} {kind}" for key in ("name", "run", "runs") for kind in ("file:", "memory:")),
)
#: Kinds that only a run refuses, when it builds its objects: a pilot does not open the lock-box.
_REFUSED_BY_A_RUN = ("descant.cli.trust.enforce", "judge", "lambda", "function", "TorchCheckpointIO", "hub")


def options_cases() -> Iterator[Case]:
    for way, plant in WAYS.items():
        for kind, options in evil():
            harmless = kind.startswith(_HARMLESS) or (way == "claim lock-box" and kind in _REFUSED_BY_A_RUN)
            yield Case(f"{way}: {kind}", partial(plant, options), harmless)


def claim_cases() -> Iterator[Case]:
    """Values of odd types at every place of a claim, planned and run."""
    whole = {
        **CLAIM, "options": {"trainer.max_steps": 4}, "before": {"experiment": "toy.yaml", "seed": 1, "options": {}},
        "also": [{"metric": "test/gap", "arm": "method", "at_most": 1, "minus": "test/x", "times": 2}],
        "secondary": ["test/x"], "calls": "sham/calls", "note": "x", "oracle": None, "simple": None,
        "signal": {"metric": "test/gap", "arm": "method", "against": "before", "at_most": 1}, "lockbox": {"a": 1},
        "budget": {"equal": "steps", "apart": []}, "baseline_tuning": "none",
    }  # fmt: skip
    for path in paths(whole):
        for kind, value in ODD.items():

            def plant(path: Any = path, value: Any = value) -> list[str]:
                put("evil.yaml", replaced(whole, path, value))
                return ["claims", "plan", "./evil.yaml", "--results", "results"]

            yield Case(f"claim {'.'.join(map(str, path))}: {kind}", plant, fine=True)
    for name in ("../../x", f"{ELSEWHERE}/x", "a/b", "a\nb", "..", "", "x" * 300, "--trust", "a=b"):

        def named(name: str = name) -> list[str]:
            put("evil.yaml", replaced(CLAIM, ("arms", name), {"options": {"trainer.max_epochs": 1}}))
            return ["claims", "run", "./evil.yaml", "--budget", "pilot", "--results", "results", *TRUST]

        yield Case(f"arm called {name[:30]!r}", named, fine=True)
    for text in ("", "[]", "x", "!!python/object/apply:os.system [touch ran]", "a: &a [*a]", "{" * 5000, "\0", "a: 0x_",
                 "? [a]\n: b", "title: 2026-99-99", "--- a\n--- b", "a: !!binary 'x'",
                 "a: !!timestamp 'x'"):  # fmt: skip

        def text_of(text: str = text) -> list[str]:
            put("evil.yaml", text)
            return ["claims", "plan", "./evil.yaml", "--results", "results"]

        yield Case(f"claim as {text[:20]!r}", text_of)


CARD: dict[str, Any] = {
    "extends": "h100", "card": {"name": "x", "source": "y", "memory": "80 GB", "bandwidth": "1 TB/s", "launch": "5 us",
                                "peak": {"float32": "1 TFLOP/s"}, "product_share": 0.5, "bandwidth_share": "50 %"},
    "within": {"bandwidth": "1 GB/s", "latency": "1 us", "curves": {"all_reduce/2": [[1, 2], [3, 4]]}},
    "node": 2, "store": "1 GB/s", "contention": {1: 1}, "overlap": 1, "streams": {1: 1},
    "calibration": {"machine": "m", "curves": {"product/float32": [[1, 2]]}, "overhead": {"forward": 1}, "step": 1},
}  # fmt: skip


def hardware_cases() -> Iterator[Case]:
    from descant.plan.hardware import load

    for path in paths(CARD):
        for kind, value in ODD.items():

            def plant(path: Any = path, value: Any = value) -> Call:
                put("card.yaml", replaced(CARD, path, value))
                return lambda: load("card.yaml")

            yield Case(f"card {'.'.join(map(str, path))}: {kind}", plant, fine=True)
    for text in (
        "",
        "[]",
        "a: &a [*a]",
        "{" * 5000,
        "\0",
        "extends: card.yaml",
        "a: 0x_",
        "d: 2026-99-99",
        "? [a]\n: b",
    ):

        def text_of(text: str = text) -> Call:
            put("card.yaml", text)
            return lambda: load("card.yaml")

        yield Case(f"card as {text[:20]!r}", text_of)


CONFIG: dict[str, Any] = {
    "seed_everything": 1, "name": "n", "model": {"class_path": "tests.toys.ToyRecipe", "init_args": {
        "image": {"class_path": "tests.toys.ToyTower", "init_args": {"width": 8}}, "scale": 1.0}},
    "trainer": {"max_epochs": 1, "callbacks": [], "precision": "32-true", "devices": 1, "limit_val_batches": 1},
    "data": {"class_path": "tests.toys.ToyData", "init_args": {"batch_size": 8}}, "extends": [], "ckpt_path": None,
    "test": False, "verify": False, "changed": "refuse", "resume": "never",
}  # fmt: skip


def config_cases() -> Iterator[Case]:
    """Odd values at every place of a configuration, and of a saved run's."""
    for path in paths(CONFIG):
        for kind, value in ODD.items():

            def plant(path: Any = path, value: Any = value) -> list[str]:
                put("x.yaml", replaced({}, path, value) if len(path) < 2 else replaced(CONFIG, path, value))
                return ["check", *OVER, "x.yaml", *TRUST]

            yield Case(f"configuration {'.'.join(map(str, path))}: {kind}", plant, fine=True)


#: Contents that no file of a run, model or export may have.
BROKEN: dict[str, str | bytes | None] = {
    "list": "[1, [2]]", "number": "3", "text": '"x"', "null": "null", "true": "true", "empty": "", "nul": "\0\0",
    "deep": "[" * 3000 + "]" * 3000, "keys": '{"a": {"b": [null, {"c": 1e999}]}}', "digits": "9" * 5000,
    "binary": bytes(range(256)), "dates": '{"2026-01-01": 1}', "nan": '{"val/r1": NaN}', "folder": None,
    "link": "->../secret", "circle": "->itself", "pipe": "|", "large": "x" * 2_000_000,
}  # fmt: skip


def broken(file: Path, content: str | bytes | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    if content is None:
        file.mkdir()
    elif content == "|":
        os.mkfifo(file)
    elif isinstance(content, str) and content.startswith("->"):
        file.symlink_to(file.name if content == "->itself" else os.path.abspath(content[2:]))
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


COMMANDS = (
    *(("report", "a/001"), ("compare", "a/*"), ("validate", "--run", "a/001", *TRUST), ("list",)),
    *(("fit", *OVER[:2], "--name", "a", "--resume", "auto", *TRUST), ("export", "a/001", "--out", "out", *TRUST)),
)
RUN_FILES = ("config.yaml", "versions.json", "metrics.json", "metrics.csv", "hub.json", "resume", "checkpoints",
             "resume/manifest.json", "checkpoints/manifest.json", "../latest", "../metrics.json")  # fmt: skip


def run_cases() -> Iterator[Case]:
    """Files of a run's folder that are something else, for each command that reads them."""
    for name in RUN_FILES:
        for kind, content in BROKEN.items():
            for words in COMMANDS:

                def plant(name: str = name, content: Any = content, words: Any = words) -> list[str]:
                    stranger()
                    broken(Path("runs/a/001") / name, content)
                    return list(words)

                yield Case(f"run's {name}: {kind}: {words[0]}", plant, fine=True)


def link_cases() -> Iterator[Case]:
    """Folders of runs that are links out of --runs."""
    for link in (
        "a",
        "a/001",
        "a/001/checkpoints",
        "a/001/resume",
        "a/001/metrics.json",
        "a/001/.lock",
        "a/001/config.yaml",
    ):
        for words in (*COMMANDS[2:3], *COMMANDS[4:5], ("fit", *OVER[:2], "--name", "a", *TRUST),
                      ("fit", *OVER[:2], "--run", "a/001", "--resume", "auto", *TRUST),
                      ("predict", "--run", "a/001", *TRUST)):  # fmt: skip

            def plant(link: str = link, words: Any = words) -> list[str]:
                stranger()
                shutil.rmtree("outside", ignore_errors=True)
                Path("outside").mkdir()
                shutil.move(Path("runs") / link, "outside/there") if (Path("runs") / link).exists() else None
                (Path("runs") / link).symlink_to(Path("outside/there").absolute())
                return list(words)

            yield Case(f"link {link}: {' '.join(words[:1] + words[3:5])}", plant, fine=True)


# models, exports, data ----------------------------------------------------------------------------------------------

#: Values of JSON that nobody expects at a key.
ODD_JSON: dict[str, Any] = {kind: ODD[kind] for kind in ("digits", "nan", "list", "mapping", "true", "null", "empty",
                            "long", "control", "path", "negative")}  # fmt: skip
ODD_JSON["hub"] = "somebody/name"
MODELS = ("clip", "siglip", "dino", "timm", "open_clip", "sentence", "bert")


def models(where: Path) -> None:
    """Tiny models of each owner, and a tokenizer, for :func:`model_cases`."""
    from tests.modules.towers import folders

    for name in MODELS[:-1]:
        (where / name).mkdir(parents=True)
        getattr(folders, name)(where / name)
    from transformers import BertConfig, BertModel

    sizes = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    BertModel(BertConfig(**sizes)).save_pretrained(where / "bert")
    folders.tokenizer(where / "bert")


def model(name: str) -> Path:
    shutil.rmtree("model", ignore_errors=True)
    shutil.copytree(Path("../models") / name, "model", symlinks=True)
    return Path("model")


def readers(name: str) -> dict[str, Call]:
    from descant.modules.tokenizers.text import BPETokenizer, PretrainedTokenizer
    from descant.modules.towers import PretrainedTower, TimmTower, TransformersTower

    folder = Path("model")
    part: Any = "image" if name in ("clip", "siglip", "open_clip") else None
    found: dict[str, Call] = {
        "tower": lambda: PretrainedTower(folder, part=part, output="embedding" if part else "tokens")
    }
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists():
        found["tokenizer"] = lambda: PretrainedTokenizer(folder, length=8)
        found["merges"] = lambda: BPETokenizer(folder / "tokenizer.json", size=9)
    if name == "timm":
        found["timm"] = lambda: TimmTower("resnet18", weights=folder / "model.safetensors")
    if name == "bert":
        found["transformers"] = lambda: TransformersTower(folder=folder)
    return found


def model_cases() -> Iterator[Case]:
    """Each file of a model's folder broken; each value of its configurations of an odd type; folders that are links."""
    for name in MODELS:
        top = Path("../models") / name
        files = sorted(file.relative_to(top) for file in top.rglob("*") if file.is_file())
        for file in [*files, Path("model.safetensors.index.json"), Path("adapter_config.json")]:
            for kind, content in BROKEN.items():
                yield from _of_model(name, f"{file}: {kind}", lambda file=file, content=content: broken(  # type: ignore[misc]
                    Path("model") / file, content))  # fmt: skip
            if file.suffix == ".json" and (top / file).is_file() and file.name != "tokenizer.json":
                whole = json.loads((top / file).read_text())
                for path in paths(whole):
                    for kind, value in ODD_JSON.items():
                        yield from _of_model(name, f"{file} {'.'.join(map(str, path))}: {kind}", lambda file=file,  # type: ignore[misc]
                            whole=whole, path=path, value=value: (Path("model") / file).write_text(
                                _json(replaced(whole, path, value))))  # fmt: skip
        for names in (["a"], {"w": "../../secret"}, {"w": 3}, {"w": "/etc/passwd"}, {"w": None}, 3, None):
            index = json.dumps(["a"] if names is None else {"weight_map": names})
            yield from _of_model(name, f"index {index}", lambda index=index: _indexed(index))  # type: ignore[misc]
    for sub in ("1_Pooling", "0_Transformer", "."):
        yield from _of_model("sentence", f"{sub} is a link", lambda sub=sub: _moved(Path("model") / sub))  # type: ignore[misc]


def _json(value: Any) -> str:
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(4300)


def _indexed(index: str) -> None:
    (Path("model") / "model.safetensors").unlink(missing_ok=True)
    (Path("model") / "model.safetensors.index.json").write_text(index)


def _moved(folder: Path) -> None:
    shutil.rmtree("outside", ignore_errors=True)
    if folder.is_dir():
        shutil.move(folder, "outside")
        folder.symlink_to(Path("outside").absolute())


def _of_model(name: str, what: str, change: Callable[[], object]) -> Iterator[Case]:
    for reader in ("tower", "tokenizer", "merges", "timm", "transformers"):
        if reader in {"timm": ("tower", "timm"), "bert": ("tokenizer", "merges", "transformers")}.get(name, ("tower",)):

            def plant(reader: str = reader) -> Call:
                model(name)
                call = readers(name).get(reader)
                change()
                return call or (lambda: None)

            yield Case(f"{name}'s {what}: {reader}", plant, fine=True)


def export_cases() -> Iterator[Case]:
    """Files of an export that are something else, and odd values in its configurations, to each reader."""
    import descant
    from descant.modules.adaptation.saved_tower import SavedTower

    def copy() -> None:
        shutil.rmtree("export", ignore_errors=True)
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree("../export", "export", symlinks=True)

    trust = ["tests.toys"]
    calls: dict[str, Call | list[str]] = {
        "load": lambda: descant.load("export", trust=trust),
        "embedder": lambda: descant.Embedder("export", trust=trust),
        "tower": lambda: SavedTower(Path("export"), "image"),
        "export": ["export", "export", "--out", "out", *TRUST],
    }

    def case(what: str, change: Callable[[], object]) -> Iterator[Case]:
        for reader, call in calls.items():

            def plant(call: Any = call) -> Any:
                copy()
                change()
                return call

            yield Case(f"export's {what}: {reader}", plant, fine=True)

    for name in ("config.yaml", "preprocess.yaml", "model.safetensors", "manifest.json", "README.md", "sub"):
        for kind, content in BROKEN.items():
            yield from case(f"{name}: {kind}", partial(broken, Path("export") / name, content))
    config = {"model": CONFIG["model"], "data": CONFIG["data"]}
    for path in paths(config):
        for kind, value in ODD.items():
            yield from case(f"{'.'.join(map(str, path))}: {kind}", lambda path=path, value=value: put(  # type: ignore[misc]
                "export/config.yaml", replaced(config, path, value)))  # fmt: skip
    for kind, options in evil():
        yield from case(kind, lambda options=options: put(  # type: ignore[misc]
            "export/config.yaml", laid(config, nested(options))))  # fmt: skip
        part = nested(options).get("data") or nested(options).get("model")
        yield from case(f"preprocess {kind}", lambda part=part: put("export/preprocess.yaml", {"text": [part]}))  # type: ignore[misc]


ROWS = ("../secret", "/etc/passwd", "a/../../secret", f"http://{HOST}/a.png", "pipe:touch ran", "there.png", "~/x",
        "\x00", "a\nb", "x" * 5000, "file:///etc/passwd", "//127.0.0.1/x")  # fmt: skip


def data_cases() -> Iterator[Case]:
    """Tables whose rows name files elsewhere, archives with odd members, odd tables."""
    import io
    import tarfile

    def table(name: str, text: str | bytes) -> Callable[[], list[str]]:
        def plant() -> list[str]:
            shutil.rmtree("photos", ignore_errors=True)
            Path("photos").mkdir()
            Path("secret").write_text("secret")
            (Path("photos") / "there.png").symlink_to(Path("secret").absolute())
            (Path("photos") / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            return ["data", "look", "photos", "--out", "out/x.png"]

        return plant

    for row in ROWS:
        yield Case(f"csv row {row[:20]!r}", table("t.csv", f'file,caption\n"{row}",x\n'), fine=True)
        yield Case(
            f"jsonl row {row[:20]!r}", table("t.jsonl", json.dumps({"file": row, "caption": "x"}) + "\n"), fine=True
        )
    for kind, content in BROKEN.items():
        if isinstance(content, str | bytes) and not str(content).startswith(("->", "|")):
            for name in ("t.csv", "t.jsonl", "t.tsv", "metadata.jsonl", "t.parquet", "a.tar", "a.png", "a.arrow"):
                yield Case(f"{name}: {kind}", table(name, content), fine=True)
    for name in (*ROWS, "a.png", "a.json", "a.txt", "__x__/a", "a.pyd", "a.pickle", "a.pth"):
        for type_ in (
            tarfile.REGTYPE,
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        ):
            with io.BytesIO() as file:
                with tarfile.open(fileobj=file, mode="w") as archive:
                    info = tarfile.TarInfo(name.replace("\0", "0"))
                    info.type, info.linkname, info.size = type_, "../secret", 3 if type_ == tarfile.REGTYPE else 0
                    archive.addfile(info, io.BytesIO(b"abc"))
                made = file.getvalue()
            yield Case(f"member {name[:20]!r} {type_!r}", table("a.tar", made), fine=True)


#: All of them, by kind.
KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "options": options_cases, "claims": claim_cases, "hardware": hardware_cases, "configurations": config_cases,
    "runs": run_cases, "links": link_cases, "models": model_cases, "exports": export_cases, "data": data_cases,
}  # fmt: skip


def prepare(top: Path) -> None:
    """What cases copy: a run that was trained, an export of it, and models; beside the working folder of each case."""
    (top / "work").mkdir()
    os.chdir(top / "work")
    from tests.conftest import TOY

    put("toy.yaml", TOY.replace("max_epochs: 2", "max_epochs: 1"))
    put("../secret", "a: secret\n")
    done = captured("fit", "--config", "toy.yaml", "--name", "a", "--test", "true", *TRUST)
    assert done.rc == 0, done.err
    assert (done := captured("export", "a/001", "--out", "../export", *TRUST)).rc == 0, done.err
    shutil.move("runs", Path("..") / TEMPLATE)
    models(top / "models")
