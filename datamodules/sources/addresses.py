"""Open shards by address: local files, http(s), s3 and gs through their programs, and shell pipes where allowed.

No address is interpreted by another scheme than the one checked here, and no other code is run for it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from webdataset.gopen import Pipe, gopen_curl, gopen_gsutil, gopen_pipe

from descant.datamodules.sources.base import nearest

#: Scheme -> the program that fetches it; None where Python opens it.
SCHEMES = {"": None, "file": None, "http": "curl", "https": "curl", "s3": "aws", "gs": "gsutil", "pipe": None}
#: Characters of an address; no quotes, spaces or signs that a program on the way could act on.
_ADDRESS = re.compile(r"[\w:/.,~%?&=+@#\[\]-]+")


def scheme_of(url: str) -> str:
    """The scheme of an address; empty for a file."""
    return url.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) else ""


def is_local(url: str) -> bool:
    """Whether an address is a file on this machine."""
    return scheme_of(url) in ("", "file")


def local_path(url: str) -> Path:
    """The path of a local address."""
    return Path(url2pathname(urlsplit(url).path) if scheme_of(url) == "file" else url)


def require_allowed(url: str, allow_pipes: bool) -> None:
    """Raises ValueError for an address of an unknown scheme, with odd characters, or of a pipe that is not allowed."""
    # parsers of addresses strip these, and would then read another scheme than the one checked here
    if url != url.strip() or not url.isprintable():
        raise ValueError(f"urls: {url!r} has blanks around it or a control character, which no address has")
    scheme = scheme_of(url)
    if scheme == "pipe":
        if not allow_pipes:
            raise ValueError(f"urls: {url!r} runs a command in a shell; allow_pipes: true allows it")
        return
    if scheme not in SCHEMES:
        raise ValueError(f"urls: {url!r}: no way to read {scheme}:{nearest(scheme, [s for s in SCHEMES if s])}")
    program = SCHEMES[scheme]
    if program is not None:
        if not _ADDRESS.fullmatch(url):
            raise ValueError(f"urls: {url!r} is no plain address")
        if shutil.which(program) is None:
            raise ValueError(f"urls: {url!r} is read by the program {program}, which is not installed")
    elif url == "-":
        raise ValueError("urls: '-' is standard input; a stream is read again in every epoch")


def open_address(url: str) -> Any:
    """The bytes of an address as a file object, by its scheme."""
    scheme = scheme_of(url)
    if scheme == "pipe":
        return gopen_pipe(f"pipe:{url[5:]}")
    if scheme in ("http", "https"):
        return gopen_curl(url)
    if scheme == "gs":
        return gopen_gsutil(url)
    if scheme == "s3":  # webdataset has no opener for it
        return Pipe(["aws", "s3", "cp", "--quiet", url, "-"], mode="rb", ignore_status=[141])
    handle = os.open(local_path(url), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not hang the run
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("not a regular file")
    return os.fdopen(handle, "rb")


def one_line(error: Exception, url: str) -> str:
    """An error of reading an address, in one line without the address."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    status = re.search(r"exit (\d+)", str(error))
    if status:
        return f"its command ended with exit status {status[1]}"
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.split()).replace(url, "it")[:160]
