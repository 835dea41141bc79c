"""Objects of stores (http, https, s3, gs) as files that are read once, in order: retried, checked, and cached.

fsspec has the protocols and the credentials. This module adds what fsspec leaves open: one count of attempts for all of
them, an error if a body ends early or an object changes meanwhile, blocks that are fetched ahead, and one-line
messages.
"""

from __future__ import annotations

import importlib.util
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from descant.datamodules.sources.shard_cache import CopyWriter, ShardCache, ShardCopy
from descant.modules.core.errors import Outage, warn

#: The most bytes of one request; those of the first, so that the first sample need not wait for many of them; and the
#: number of blocks that are fetched while the last one is decoded.
BLOCK, FIRST, AHEAD = 8 << 20, 1 << 20, 2
#: Seconds before the second attempt, doubled for each further one, at most the second number.
_WAIT, _LONGEST_WAIT = 0.1, 30.0
#: Statuses below 500 that another attempt may change: timeout, too early, too many requests.
_AGAIN = (408, 425, 429)
#: Scheme -> package of its protocol, what `pip install` takes, and where its credentials come from.
PACKAGES = {
    "http": ("aiohttp", "aiohttp", "~/.netrc"),
    "https": ("aiohttp", "aiohttp", "~/.netrc"),
    "s3": ("s3fs", "'descant[s3]'", "AWS_PROFILE, AWS_ACCESS_KEY_ID or the machine's role"),
    "gs": ("gcsfs", "'descant[gs]'", "gcloud auth application-default login"),
}
#: Fields of fsspec's details of an object, one of which changes with its content.
_TAGS = ("ETag", "etag", "md5Hash", "generation", "Last-Modified", "LastModified")
#: Errors of packages, by name, that no further attempt changes: there are no credentials.
_KEYLESS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
#: Mistakes in a program, which are no faults of a store.
_BUGS = (TypeError, AttributeError, NameError, ImportError, NotImplementedError, MemoryError)

#: Every file system that was made, by its identity. fsspec forgets them in a forked process, where the end of one would
#: close its connections. The parent shares the epoll they are registered with, and would wait in vain for answers.
_MADE: dict[int, Any] = {}

Result = TypeVar("Result")


class Remote(NamedTuple):
    """How objects are fetched.

    Attributes:
        attempts: attempts at one request, before it is given up. timeout: seconds without an answer or a byte.
        cache: the most bytes of the node's cache; 0 keeps nothing.
    """

    attempts: int = 10
    timeout: float = 60.0
    cache: int = 0


class StoreError(ValueError):
    """Raised for an object that cannot be read: why, the status, the attempts, in one line without its address."""


class StoreOutage(StoreError, Outage):
    """Raised if the same may succeed in a later attempt: the store is not there, or overloaded."""


class _Changed(Exception):
    """Raised if another object has the name now."""


class _Short(Exception):
    """Raised if fewer bytes came than there are."""


def missing_package(scheme: str) -> str | None:
    """Return the error line for a scheme whose package is not installed, otherwise None.

    >>> missing_package("https") is None
    True
    """
    package, install, _ = PACKAGES[scheme]
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{scheme}: is read by the package {package}, which is not installed: pip install {install}"


def open_object(url: str, remote: Remote) -> StoreObject | ShardCopy:
    """Open an object of a store, or its copy in the cache if length and tag are still the same.

    Raises:
        StoreError: for one that is not there or not readable. StoreOutage: if the store fails in all attempts.
    """
    object = StoreObject(url, remote)
    if not remote.cache or object.tag is None or object.size is None:
        return object.begin(None)
    cache = ShardCache(remote.cache)
    name = cache.name(url, object.size, object.tag)
    kept = cache.open(name, object.size)
    if kept is not None:
        object.close()
        return kept
    return object.begin(cache.reserve(name, object.size))


class StoreObject:
    """One object of a store, read from its beginning to its end.

    A separate thread fetches blocks ahead, each by a request of its range, with ``If-Match`` if the protocol has it. A
    failed request is tried again from the byte where it failed. If the server has no ranges, one response is read;
    after it fails, another one is read up to that byte.
    """

    def __init__(self, url: str, remote: Remote) -> None:
        self.url, self.remote, self.scheme = url, remote, urlsplit(url).scheme.lower()
        self.files = filesystem(self.scheme, remote.timeout)
        self._ranged, self._known, self._begun = True, False, False
        self._file: Any = None
        self._at = 0  # bytes received
        self._stop, self._room = threading.Event(), threading.Semaphore(AHEAD)
        self._blocks: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
        self._rest: memoryview | None = memoryview(b"")
        self.size: int | None = None
        self.tag: str | None = None
        self._retry(self._open)

    def begin(self, writer: CopyWriter | None) -> StoreObject:
        """Start fetching; the bytes are also given to ``writer``."""
        self._begun = True
        threading.Thread(target=self._fetch, args=(writer,), name="object-store", daemon=True).start()
        return self

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes, fewer only at the end, as from a file.

        Raises:
            StoreError: if the object has changed. StoreOutage: if the bytes do not come in all attempts.
        """
        parts = []
        while size != 0 and self._rest is not None:
            if not self._rest:
                block = self._blocks.get()
                self._room.release()
                if isinstance(block, BaseException):
                    self._rest = None
                    raise block
                self._rest = memoryview(block) if block else None
                continue
            part = self._rest if size < 0 else self._rest[:size]
            self._rest = self._rest[len(part) :]
            parts.append(part)
            size -= len(part) if size > 0 else 0
        return b"".join(parts)

    def close(self) -> None:
        """End the thread, which drops what it was writing."""
        self._stop.set()
        self._room.release()
        self._rest = None
        if not self._begun:
            self._drop()

    # the thread ------------------------------------------------------------------------------------------------

    def _fetch(self, writer: CopyWriter | None) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stop.is_set():
                    return
                block = self._retry(self._block)
                if not block:
                    self._retry(self._require_unchanged)
                    if self._at == self.size or self.size is None:
                        break
                    block = self._retry(self._block)  # the first answer had named too few bytes
                self._at += len(block)
                if writer is not None and not writer.write(block):
                    writer = None  # the disk is full: read on without a copy
                self._blocks.put(block)
            if writer is not None:
                writer.commit()
            self._blocks.put(b"")
        except BaseException as error:  # raised where the block is read
            self._blocks.put(error)
        finally:
            if writer is not None:
                writer.discard()
            self._drop()

    def _block(self) -> bytes:
        """Read the bytes from ``_at`` on; none at the end."""
        if self._file is None:
            self._open()
        at = self._at
        wanted = min(BLOCK, max(FIRST, at))  # doubled, up to a whole block
        wanted = wanted if self.size is None else min(wanted, self.size - at)
        data = bytes(self._file.read(wanted)) if wanted else b""
        if len(data) < wanted and self.size is not None and (self._ranged or not data):
            raise _Short(f"cut off by the store: {len(data):,} of {wanted:,} bytes from byte {at:,} on")
        return data

    def _open(self) -> None:
        """Open fsspec's file, at byte ``_at``, for the object that was there first."""
        options: dict[str, Any] = {"cache_type": "none"}
        if self.scheme in ("http", "https"):
            details = self.files.info(self.url)
            options["size"] = details["size"]
            self._ranged &= details["size"] is not None
            tag = str(details.get("ETag") or "")
            if tag.startswith('"'):  # a weak tag matches nothing
                options["headers"] = {**self.files.kwargs.get("headers", {}), "If-Match": tag}
            self._same(details)
            self._file = self.files.open(self.url, "rb", block_size=BLOCK if self._ranged else 0, **options)
        else:
            self.files.invalidate_cache()
            self._file = self.files.open(self.url, "rb", block_size=BLOCK, **options)
            self._same(self._file.details)
        if self._ranged and self._at:
            self._file.seek(self._at)
        passed = self._at if self._ranged else 0
        while passed < self._at:
            passed += (some := len(self._file.read(min(self._at - passed, 1 << 20))))
            if not some:
                raise _Short(f"cut off by the store: now at byte {passed:,}, before at byte {self._at:,}")

    def _require_unchanged(self) -> None:
        if self.scheme != "s3":  # s3 compares the tag at each request
            self.files.invalidate_cache()
            self._same(self.files.info(self.url))

    def _same(self, details: dict[str, Any]) -> None:
        size = details.get("size")
        tag = next((f"{key} {details[key]}" for key in _TAGS if details.get(key)), None)
        if not self._known:
            self.size, self.tag, self._known = size, tag, True
        elif tag is not None and tag == self.tag and size is not None and self.size is not None:
            if size < self.size:
                raise _Short(f"cut off by the store: {size:,} of {self.size:,} bytes")
            self.size = size
        elif (size, tag) != (self.size, self.tag):
            raise _Changed

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception:  # a broken connection
                return

    def _retry(self, call: Callable[[], Result]) -> Result:
        """Return the result of a call to the store, which is repeated after a passing fault."""
        number, began = 0, time.monotonic()
        while True:
            try:
                return call()
            except _BUGS:
                raise
            except Exception as error:
                self._drop()
                if self._ranged and isinstance(error, ValueError) and "range requests" in str(error):
                    self._ranged = False  # fsspec: this server gives whole objects only
                    continue
                number += 1
                why, passing, remedy = self._why(error)
                if not passing or number >= self.remote.attempts or self._stop.is_set():
                    took = f" in {time.monotonic() - began:.0f} s" if number > 1 else ""
                    kind = StoreOutage if passing else StoreError
                    raise kind(f"{why}, {number} attempt{'s' if number > 1 else ''}{took}{remedy}") from None
                # not from the generators that a run seeds
                wait = min(_WAIT * 2 ** (number - 1), _LONGEST_WAIT) * random.SystemRandom().uniform(0.5, 1)
                if number == self.remote.attempts // 2:
                    warn(f"{self.url}: {why}, attempt {number} of {self.remote.attempts}; again in {wait:.1f} s")
                self._stop.wait(wait)

    def _why(self, error: BaseException) -> tuple[str, bool, str]:
        """Return what is wrong, in a text that cannot hold a credential; whether it may pass; and a remedy."""
        status, code = _status(error)
        chain = _chain(error)
        names = {type(each).__name__ for each in chain}
        keys = f"; credentials come from {PACKAGES[self.scheme][2]}"
        if isinstance(error, _Changed) or status == 412 or "FileExpired" in names:
            return "another object took its place while it was read", False, ""
        if isinstance(error, _Short):
            return str(error), True, ""
        if status is not None:
            what = f"status {status}{code}{': no such object' if status == 404 else ''}"
            return what, status >= 500 or status in _AGAIN, keys if status in (401, 403) else ""
        if names & set(_KEYLESS):
            return "no credentials", False, keys
        if any(isinstance(each, TimeoutError) or "Timeout" in type(each).__name__ for each in chain):
            return f"no answer within {self.remote.timeout:g} s", True, ""
        words = [each.strerror for each in reversed(chain) if isinstance(each, OSError) and each.strerror]
        where = f" at byte {self._at:,}" if self._known else ""
        return f"{words[0].lower() if words else 'the connection broke'}{where} ({type(chain[-1]).__name__})", True, ""


def filesystem(scheme: str, timeout: float) -> Any:
    """Return fsspec's file system of a scheme, without attempts of its own where an option turns them off.

    Endpoints and credentials come from the environment and from fsspec's configuration, which overrides these options.
    """
    import fsspec
    from fsspec.config import conf

    options: dict[str, dict[str, Any]] = {}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        waits = ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        # proxies and ~/.netrc come from the environment; error answers are closed, which fsspec forgets; content that
        # is compressed on the way would have another length
        session = {"timeout": waits, "trust_env": True, "raise_for_status": True}
        options = {"client_kwargs": session, "headers": {"Accept-Encoding": "identity"}}
    elif scheme == "s3":
        waits_s3 = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
        options = {"config_kwargs": waits_s3}
    given = conf.get(scheme, {})
    files = fsspec.filesystem(scheme, **{key: {**part, **given.get(key, {})} for key, part in options.items()})
    if scheme == "s3":
        files.retries = 1
    _MADE[id(files)] = files
    return files


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and its causes, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _status(error: BaseException) -> tuple[int | None, str]:
    """Return the status of an answer and the store's word for it, from the errors of aiohttp, botocore and gcsfs."""
    chain = _chain(error)
    for each in chain:
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            code = str(answer.get("Error", {}).get("Code", ""))
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status, f" ({code})" if code.isalpha() else ""
        value = getattr(each, {"ClientResponseError": "status", "HttpError": "code"}.get(type(each).__name__, ""), None)
        if isinstance(value, int):
            return value, ""
        if isinstance(each, OSError) and str(each).startswith("Forbidden: "):  # gcsfs's only sign
            return 403, ""
        if type(each) is FileExistsError:
            return 412, ""
    return (404, "") if type(chain[-1]) is FileNotFoundError else (None, "")
