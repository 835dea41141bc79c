"""A second place for the newest resume point: a folder, or any place that an installed fsspec file system writes to."""

from __future__ import annotations

import contextlib
import posixpath
import threading
from pathlib import Path

from descant.modules.core.errors import hint, one_line, warn
from descant.modules.io import manifest
from descant.modules.io.part_files import PARTS, parts_of

#: Files of a run's folder without which its checkpoints are weights of an unknown model.
_OF_RUN = ("config.yaml", "versions.json")


class Mirror:
    """Copier of the newest resume point to ``url/run/``; a failed copy is a warning, and the point on disk stays valid.

    The copy is a run's folder with one resume point, for ``--resume``, ``validate``, ``export`` and ``load``. The run's
    configuration and the parts are copied first, the manifest next and the checkpoint's file last. Only then are the
    copies of older points removed. The manifest reveals a copy that ended half way, as it does on disk. A separate
    thread makes the copies, so that training and saving never wait for them. A point that comes while another is copied
    replaces one that waits. The end of a run waits for the last copy.

    Args:
        url: a path, or a URL such as ``s3://bucket/checkpoints``, whose file system is installed.
        run: name and number of the run.
    """

    def __init__(self, url: str, run: str) -> None:
        import fsspec

        try:
            self.files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            near = hint(url.partition("://")[0], fsspec.available_protocols(), most=0)
            raise ValueError(f"{url}: {one_line(error, 200)}{near if isinstance(error, ValueError) else ''}") from None
        self.url, self.folder = url, posixpath.join(root, run)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._next: Path | None = None
        self._fault = ""

    def copy(self, path: Path) -> None:
        """Copy a resume point, or a later one that is given meanwhile; return at once."""
        with self._lock:
            self._next = path
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Wait until the newest point that was given is copied or has failed."""
        if (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                path, self._next = self._next, None
                if path is None:
                    self._thread = None
                    return
            try:
                self._copy(path)
                self._fault = ""
            except Exception as error:  # each file system raises its own
                fault = one_line(error, 200)
                if path.exists() and fault != self._fault:  # else retention removed it, and a newer one comes
                    warn(f"{self.url}: {path.name} is not copied there ({fault}); the run goes on, {path} is valid")
                    self._fault = fault

    def _copy(self, path: Path) -> None:
        entry = manifest.read_entry(path)
        if entry is None:
            raise FileNotFoundError(f"{path}: removed")
        there = posixpath.join(self.folder, path.parent.name)
        self.files.makedirs(there, exist_ok=True)
        self.files.invalidate_cache()
        before = set(self.files.find(there))
        names = [*(part["name"] for part in parts_of(entry)), path.name + manifest.SUFFIX, path.name]
        targets = {posixpath.join(there, name): path.parent / name for name in names}
        run = [path.parent.parent / name for name in _OF_RUN]
        targets = {posixpath.join(self.folder, file.name): file for file in run if file.is_file()} | targets
        try:
            for target, source in targets.items():
                self._put(source, target)
        except BaseException:
            self._remove([target for target in targets if target not in before])
            raise
        old = before - targets.keys()
        self._remove(sorted(old, key=lambda file: not file.endswith(path.suffix)))  # checkpoint files first

    def _put(self, source: Path, target: str) -> None:
        self.files.makedirs(posixpath.dirname(target), exist_ok=True)
        self.files.put_file(str(source), target)
        size = self.files.size(target)
        if size != source.stat().st_size:
            raise OSError(f"{size} of {source.stat().st_size} bytes of {source.name} arrived")

    def _remove(self, files: list[str]) -> None:
        """Remove files, and folders that they leave empty, as far as possible; leftovers do no harm."""
        for file in files:
            with contextlib.suppress(Exception):
                self.files.rm(file)
        for folder in {posixpath.dirname(file) for file in files}:
            with contextlib.suppress(Exception):
                if PARTS in folder and not self.files.find(folder):
                    self.files.rmdir(folder)
