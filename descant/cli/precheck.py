"""Check every key before the real parse: the first error is one line with place and nearest key.

The parser's own errors are long unions of attempts that name no file. The check runs twice: on the cached schema,
before torch is imported, and on the parser itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from descant.cli import bounds, schema, trust
from descant.cli.arguments import Request
from descant.cli.catalogue import BASE, OVERLAYS, ROOT, list_bases
from descant.cli.document import Node, load, option, replaced
from descant.cli.errors import Refusal, hint, nearest
from descant.cli.schema import Ambiguous, Entry, Key, Part, Schema, Type, Unknown, nested_classes
from descant.modules.io import names
from descant.run import runs

_SPEC = ("class_path", "init_args", "dict_kwargs")
#: Keys of the command line only.
_CALL_ONLY = {"trust": "a configuration cannot trust itself", "config": "files are composed on the command line"}
#: Common name of a key -> its name here.
_SHORT = {
    "seed": "seed_everything",
    "epochs": "max_epochs",
    "steps": "max_steps",
    "learning_rate": "lr",
    "bs": "batch_size",
    "gpus": "devices",
    "workers": "num_workers",
    "ckpt": "ckpt_path",
    "checkpoint": "ckpt_path",
}
Path_ = tuple[str, ...]


def needs_check(request: Request) -> bool:
    """Whether a request needs this check; requests for help do not."""
    return not any(key == "help" or key.endswith(".help") for key, _ in request.options)


def precheck(
    known: Schema, files: Sequence[Path], options: list[tuple[str, str | None]], trusted: Sequence[str]
) -> Walk:
    """Check configurations and options in the order in which they apply; return the resulting state."""
    walk = Walk(known, trusted)
    _one_experiment(files)
    for file in (BASE, *files):
        root = load(file)
        if not root.content:
            raise Refusal(f"{root.where}: empty: a configuration is a mapping of keys, such as model: and data:")
        try:
            walk.source(root)
        except Refusal as refusal:
            if note := _written_by(file):
                raise type(refusal)(f"{refusal}{note}") from None
            raise
    for key, value in options:
        if value is not None and not key.endswith(("help", "print_config")):
            walk.source(option(key, value))
    walk.unambiguous()
    walk.check_required()
    return walk


def _one_experiment(files: Sequence[Path]) -> None:
    """Raise Refusal for two experiments that ship, because their keys would be mixed without an error."""
    if len(files) < 2:
        return
    root, given = ROOT.resolve(), list[str]()
    below = {first for file in files for first in list_bases(file)}
    for file in (file.resolve() for file in files if file not in below):
        name = file.relative_to(root).with_suffix("").as_posix() if file.is_relative_to(root) else ""
        if name and name not in given and name.partition("/")[0] not in (*OVERLAYS, "claims", BASE.stem):
            given.append(name)
    if len(given) > 1:
        listed = " and ".join(f"--config {name}" for name in given[:3])
        raise Refusal(
            f"{listed}: {len(given)} experiments at once; one, and overlays (data/, with/, on/: descant list)"
        )


def _written_by(file: Path) -> str:
    """Name the commit that wrote a run's configuration, if it is another one; "" for any other file."""
    from descant.run.versions import code  # only when a file is refused, not at each start

    wrote = runs.versions_of(file.parent).get("revision") if file.name == "config.yaml" else None
    return "" if wrote in (None, code()["revision"]) else f"; commit {str(wrote)[:12]} wrote this run and reads it"


class Walk:
    """State of a check: the class at each path so far, and which of its arguments are given."""

    def __init__(self, known: Schema, trusted: Sequence[str]) -> None:
        self.schema, self.trusted = known, trusted
        self.classes: dict[Path_, Entry] = {}
        self.unknown: set[Path_] = set()
        self.places: dict[Path_, str] = {}
        self.given: dict[Path_, set[str]] = {}
        self.last: dict[Path_, Path_] = {}  # list -> its last item
        self.added = 0  # items that options have added
        self.files = list[Node]()  # files of this source: itself, and those it names
        self.short = list[tuple[Node, Sequence[Part], Path_]]()  # the user's class names without a module

    def default(self, place: Sequence[str | int]) -> str | None:
        """Return the default at a place, as text; None if there is none or it is unknown."""
        *path, last = map(str, place)
        entry = self.classes.get(tuple(path))
        key = entry.keys.get(last) if entry is not None else self.schema.command.get(".".join((*path, last)))
        return key.default if key is not None else None

    def source(self, root: Node) -> None:
        """Check one file or option."""
        self.files = [root]
        self._require_trust(root)
        keys = self.schema.command
        groups = {key.split(".")[0] for key in keys if "." in key}
        for key, node in root.content.items():
            if key in groups:
                self._group(key, node, keys)
            elif key in keys:
                self._value(node, None, key, keys[key], (key,))
            elif key in _CALL_ONLY:
                raise Refusal(f"{node.where}: {key}: {_CALL_ONLY[key]}")
            else:
                valid = {*groups, *(name for name in keys if "." not in name), *(_CALL_ONLY if node.typed else ())}
                near = self._deeper(key, keys) or hint(key, valid)
                raise Refusal(f"{_at(node, (key,))}: no such key{near}")

    def _deeper(self, key: str, keys: Mapping[str, Key]) -> str:
        """Return ``; nearest: trainer.max_steps`` for ``max_steps``, if some place has the key; otherwise ""."""
        wanted = _SHORT.get(key, key)
        places = [name for name in keys if name.rpartition(".")[2] == wanted]
        places += [".".join((*path, wanted)) for path, entry in self.classes.items() if wanted in entry.keys]
        places = sorted((name for name in places if "@" not in name), key=lambda name: (name.count("."), name))
        return f"; nearest: {places[0]}" if places else ""

    def _require_trust(self, node: Node, path: Path_ = (), of: Any = None) -> None:
        """Refuse what a file or option may not name or set without --trust, at any depth.

        Args:
            of: the class whose arguments these are, as the file calls it.
        """
        if isinstance(node.content, list):
            for item in node.content:
                self._require_trust(item, path)
        elif isinstance(node.content, dict):
            named = node.content.get("class_path")
            of = of if named is None else named.plain
            for key, child in node.content.items():
                if key == "class_path" and isinstance(child.content, str) and "." in child.content:
                    self._allowed(child.content, child.where)
                self._guard(key, child, (*path, key), of)
                self._require_trust(child, *((path, of) if key in _SPEC else ((*path, key), None)))

    def _guard(self, key: str, node: Node, path: Path_, of: Any) -> None:
        if not _ours(node):
            with _prefixing_place(_at(node, path)):
                trust.guard(key, node.plain, self.trusted, of)

    def _group(self, group: str, node: Node, keys: Mapping[str, Key]) -> None:
        node = self._file(node)
        if not isinstance(node.content, dict):
            raise Refusal(f"{_at(node, (group,))}: expected keys, got {node.content!r}")
        known = {name.removeprefix(f"{group}."): key for name, key in keys.items() if name.startswith(f"{group}.")}
        self._arguments(node, known, (group,))

    def _value(self, node: Node, owner: Entry | None, name: str, key: Key, path: Path_) -> None:
        """Check a value of the argument ``name`` of a class, or of the command."""
        if schema.calls(key.type):
            self._refuse_callables(node, key.type, path)
        self._find_classes(node, key.type, path)
        several, text = isinstance(node.content, list | dict), schema.takes_text(key.type)
        classy = isinstance(node.content, dict | str) or schema.items(key.type) is not None
        if path[-1].endswith("+") or (classy and schema.has_classes(key.type)):
            return  # each class was checked by itself
        value = node.plain if node.raw is None or (several and not text) else node.raw
        if not self.schema.accepts(owner, name, value):
            words = [str(word) for choice in schema.parts(key.type, "choice") for word in choice]
            near = nearest(node.plain, words) if isinstance(node.plain, str) else None
            got = _short(node.plain) + (f"; nearest: {near}" if near else "")
            raise Refusal(f"{_at(node, path)}: expected {schema.in_words(key.type)}, got {got}")
        if owner is None or owner.path.startswith("descant."):
            why = bounds.wrong(name, node.plain, bounds.OF_COMMAND if owner is None else bounds.OF_NAMES)
            if why is not None:
                raise Refusal(f"{_at(node, path)}: {why}")

    def _refuse_callables(self, node: Node, kind: Type, path: Path_, inside: bool = False) -> None:
        """Refuse functions and callables that the user has not named by --trust."""
        content, classes = node.content, schema.has_classes(kind)
        if isinstance(content, list | dict) and "class_path" not in content:
            for child in content.values() if isinstance(content, dict) else content:
                self._refuse_callables(child, kind, path, inside=True)
            return
        if isinstance(content, dict):
            name = str(content["class_path"].content)
            if classes and not inside:
                return  # its kind is checked
        elif isinstance(content, str) and "." in content and not (classes and self.schema.is_class(content)):
            name = content
        else:
            return
        if not trust.is_named(name, self.trusted):
            where = name.split(".")[0] if "." in name else "MODULE"
            raise Refusal(f"{_at(node, path)}: {name} would be called: --trust {where} if you trust it")

    def _find_classes(self, node: Node, kind: Type, path: Path_) -> None:
        """Find the classes inside a value of type ``kind``."""
        items, base = schema.items(kind), (*path[:-1], path[-1].removesuffix("+"))
        if isinstance(node.content, list):
            if items is None:
                return
            if base == path:
                self._forget(path)  # a list replaces the previous one
            for number, item in enumerate(node.content):
                self._item(item, items, base, f"{number}@{item.where}")
        elif path != base and items is not None:
            self.added += 1
            self._item(node, items, base, f"@{node.where}{self.added}")
        elif isinstance(node.content, dict) and node.typed and items and base in self.last:
            self._find_classes(node, items, self.last[base])  # an option below a list sets its last item
        elif classes := schema.classes(kind):
            self._class(node, kind, classes, path)
        elif isinstance(node.content, dict) and (values := schema.values(kind)) is not None:
            for key, child in node.content.items():
                if child.content is None and schema.classes(values) and not schema.fits(values, None):
                    stay = f"nearest: name all that stay, each as {{}}, under {path[-1]}"
                    raise Refusal(f"{_at(child, (*path, key))}: null does not remove {key}; {stay}")
                self._find_classes(child, values, (*path, key))

    def _item(self, node: Node, items: Type, base: Path_, name: str) -> None:
        self.last[base] = (*base, name)
        self._find_classes(node, items, self.last[base])

    def _forget(self, path: Path_) -> None:
        self.last.pop(path, None)
        for state in (self.classes, self.places, self.given):
            for key in [key for key in state if key[: len(path)] == path]:
                state.pop(key)

    def _class(self, node: Node, kind: Type, classes: Sequence[Part], path: Path_) -> None:
        if isinstance(node.content, str):
            text = node.content
            if schema.takes_text(kind) and text not in names.table() and text not in self.schema.names(classes):
                if not (node.folder / text).is_file():
                    self._forget(path)
                    return
                node = self._file(node)  # whatever its suffix
            elif text.endswith((".yaml", ".yml", ".json")):
                node = self._file(node)
            else:
                node = Node({"class_path": node}, node.where, node.folder, typed=node.typed)
        if not isinstance(node.content, dict):
            if not schema.fits(kind, node.content):
                raise Refusal(f"{_at(node, path)}: expected {schema.in_words(kind)}, got {_short(node.plain)}")
            self._forget(path)  # drop the previous class and its arguments
            return
        content = node.content
        if "class_path" in content:
            self._resolve_class(content["class_path"], classes, path)
            extra = [key for key in content if key not in _SPEC]
            if extra:
                child = content[extra[0]]
                raise Refusal(f"{_at(child, (*path, extra[0]))}: not beside class_path; put it under init_args")
        elif path not in {*self.classes, *self.unknown} and (alone := self.schema.alone(classes)) is not None:
            self._set(alone, path, node.where)
        if path not in self.classes:
            return
        if "dict_kwargs" in content:
            self._unseen(content["dict_kwargs"], path)
        listed = {key: child for key, child in content.items() if key not in _SPEC}
        inner = content.get("init_args", Node(listed, node.where, node.folder, typed=node.typed))
        if not isinstance(inner.content, dict):
            raise Refusal(f"{_at(inner, path)}: init_args are keys, got {_short(inner.plain)}")
        self._arguments(inner, self.classes[path].keys, path)

    def _replace(self, node: Node, path: str) -> None:
        """Replace a short name by the import path of its class; the parser then reads nodes instead of files."""
        node.content = path
        replaced.update({file.text: file for file in self.files if file.text})

    def _arguments(self, node: Node, known: Mapping[str, Key], path: Path_) -> None:
        """Check the arguments of the class at a path, or of a group of the command."""
        cls = self.classes.get(path)
        for key, child in node.content.items():
            plain, inner = key.removesuffix("+"), (*path, key)
            if plain not in known and cls is not None and plain == cls.name:
                where = _at(child, inner)
                raise Refusal(f"{where}: an option below a list sets its last item, here {plain}: leave out the name")
            if plain not in known:
                of = f"{cls.name} has " if cls is not None else ""
                raise Refusal(f"{_at(child, inner)}: {of}no such key{self._near(plain, known)}")
            if cls is not None:
                self.given[path].add(plain)
                self._guard(plain, child, inner, cls.name)  # the class may come from another file
            self._value(child, cls, plain if cls is not None else f"{path[0]}.{plain}", known[plain], inner)

    def _unseen(self, node: Node, path: Path_) -> None:
        """Check dict_kwargs, whose types are unknown: a file may set them only for a class named by --trust."""
        cls = self.classes[path]
        if node.content and not (node.is_of_user or trust.is_named(cls.path, self.trusted)):
            first = next(iter(node.content)) if isinstance(node.content, dict) else ""
            where = _at(node, (*path, "dict_kwargs", first))
            raise Refusal(f"{where}: a file may not set them: --trust {cls.path}, or the arguments under init_args")

    def _near(self, key: str, known: Mapping[str, Key]) -> str:
        """Suggest a key of nearly this name, else one that takes a class of this name, else a class with this key."""
        if nearest(key, known, cutoff=0.75) is not None:
            return hint(key, known)
        for name, taken in known.items():
            for kind in (part["class"].rpartition(".")[2] for part in nested_classes(taken.type)):
                if kind.lower().endswith(key.lower().replace("_", "")):
                    return f"; nearest: {name}, a {kind}"
        homes = [_dots(path) for path, cls in self.classes.items() if key in cls.keys]
        homes += ["trainer"] if f"trainer.{key}" in self.schema.command else []
        if homes:
            return f"; {homes[0]} has it: {homes[0]}.{key}"
        return hint(key, known)

    def _resolve_class(self, node: Node, classes: Sequence[Part], path: Path_) -> None:
        """Resolve a ``class_path`` and record the class at this path."""
        name = node.content
        if not isinstance(name, str) or not name.isprintable():
            raise Refusal(f"{_at(node, path)}: class_path is a name, got {_short(name)}")
        if "." in name:
            self._allowed(name, node.where)
        try:
            cls = self._find(node, name, classes)
            if "." not in node.content:
                self.short.append((node, classes, path))
            kinds = [part["class"] for part in classes if isinstance(part, dict) and part["class"] in cls.lineage]
            self._allowed(cls.path, node.where)  # a short name was not checked before
            with _prefixing_place(node.where):
                trust.require_kind(cls.path, kinds, self.trusted)
            self._set(cls, path, node.where)
        except LookupError as error:
            raise Refusal(f"{_at(node, path)}: {error}") from error
        except Unknown:
            self._forget(path)
            self.unknown.add(path)

    def _find(self, node: Node, name: str, classes: Sequence[Part]) -> Entry:
        """Find the class of a name; in a file that ships, a short name means Descant's class, never a user's."""
        shipped = not node.typed and _ours(node)
        try:
            cls = self.schema.find(name, classes)
        except Ambiguous:
            ours = names.full(name)
            if not shipped or ours is None:
                raise
            cls = self.schema.find(ours, classes)
        if shipped and "." not in name:  # a file that is read later may load another class of this name
            self._replace(node, cls.path)
        return cls

    def unambiguous(self) -> None:
        """Raise Refusal if a module loaded since has a second class with a short name that the user gave."""
        for node, classes, path in self.short:
            try:
                self.schema.find(node.content, classes)
            except Ambiguous as error:
                raise Refusal(f"{_at(node, path)}: {error}") from error

    def _set(self, cls: Entry, path: Path_, where: str) -> None:
        before = self.classes.get(path)
        self.unknown.discard(path)
        if before is not None and before.path == cls.path:
            return
        if before is not None:
            for child in [child for child in self.classes if child[: len(path)] == path and child != path]:
                if child[len(path)].partition("@")[0] not in cls.keys:
                    self._forget(child)  # belongs to the replaced class only
        self.classes[path], self.places[path] = cls, where
        self.given[path] = {key for key in self.given.get(path, ()) if key in cls.keys}

    def check_required(self) -> None:
        """Raise Refusal for a required argument that no source gives."""
        for key in ("model", "data"):
            if (key,) not in self.classes and (key,) not in self.unknown:
                raise Refusal(f"no {key}: --config NAME chooses an experiment (descant list)")
        for path, cls in self.classes.items():
            for key in cls.required:
                if key not in self.given[path]:
                    where = f"{self.places[path]}: {_dots((*path, key))}"
                    raise Refusal(f"{where}: {cls.name} needs it, and it is not given")

    def _allowed(self, name: str, where: str) -> None:
        with _prefixing_place(where):
            trust.require(name, self.trusted)

    def _file(self, node: Node) -> Node:
        """Load the nodes of the file that a value names; otherwise return the value itself."""
        if not isinstance(node.content, str):
            return node
        file = node.folder / node.content
        if not file.is_file():
            raise Refusal(f"{node.where}: no such file: {file}")
        sub_file = load(file)
        self.files.append(sub_file)
        self._require_trust(sub_file)
        return sub_file


@contextmanager
def _prefixing_place(where: str) -> Iterator[None]:
    """Prefix a Refusal raised inside with its place."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(f"{where}: {refusal}") from None


def _ours(node: Node) -> bool:
    """Whether a node is from the command line or from a file that ships; these may set what other files may not."""
    return node.is_of_user if node.typed else _ships(node.folder.absolute())


@cache
def _ships(folder: Path) -> bool:
    return folder.resolve().is_relative_to(ROOT.resolve())  # a link in a checkout


def _dots(path: Path_) -> str:
    """Return the dotted path as a user types it, without list items."""
    return ".".join(part for part in path if "@" not in part)


def _at(node: Node, path: Path_) -> str:
    """Return ``FILE:LINE: KEY``; for an option, its key."""
    return node.where if node.typed else f"{node.where}: {_dots(path)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
