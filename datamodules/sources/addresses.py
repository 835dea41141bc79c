"""Open shards by address: local files, objects of stores (http, https, s3, gs), and shell pipes where allowed.

Each address is read only by the scheme that is checked here, and no other code is run for it. No address contains a
credential, since addresses are written to the run's folder and into messages.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from webdataset.gopen import gopen_pipe

from descant.datamodules.sources.base import nearest
from descant.datamodules.sources.object_store import PACKAGES, Remote, StoreError, missing_package, open_object

#: All schemes of addresses; those of stores have a package each.
SCHEMES = ("file", *PACKAGES, "pipe")
#: Characters of an address; no quotes, spaces or signs that a program on the way could act on.
_ADDRESS = re.compile(r"[\w:/.,~%?&=+@#\[\]-]+")
#: A password before the host, or parameters by which stores sign addresses.
_SECRET = re.compile(
    r"(?i)^\w+://[^/?#]*@|[?&#](x-(amz|goog)-(signature|credential|security-token)|signature|sig|(access_?)?token|"
    r"awsaccesskeyid|googleaccessid|(api_?)?key|password)="
)


def scheme_of(url: str) -> str:
    """Return the scheme of an address; empty for a file."""
    return url.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) else ""


def is_local(url: str) -> bool:
    """Whether an address is a file on this machine."""
    return scheme_of(url) in ("", "file")


def local_path(url: str) -> Path:
    """Return the path of a local address."""
    return Path(url2pathname(urlsplit(url).path) if scheme_of(url) == "file" else url)


def require_allowed(url: str, allow_pipes: bool) -> None:
    """Raise ValueError for an address with an unknown scheme or odd characters, or for a pipe that is not allowed."""
    # parsers of addresses strip these, and would then read another scheme than the one checked here
    if url != url.strip() or not url.isprintable():
        raise ValueError(f"urls: {url!r} has blanks around it or a control character, which no address has")
    scheme = scheme_of(url)
    if scheme == "pipe":
        if not allow_pipes:
            raise ValueError(f"urls: {url!r} runs a command in a shell; allow_pipes: true allows it")
        return
    if scheme and scheme not in SCHEMES:
        raise ValueError(f"urls: {url!r}: no way to read {scheme}:{nearest(scheme, SCHEMES)}")
    if scheme in PACKAGES:
        if not _ADDRESS.fullmatch(url) or not urlsplit(url).netloc:
            raise ValueError(f"urls: {url!r} is no plain address")
        if _SECRET.search(url):
            shown = re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", url)[0])
            raise ValueError(
                f"urls: {shown} has a password or signature in its address, which the run's folder would keep; "
                f"credentials come from {PACKAGES[scheme][2]}"
            )
        if (why := missing_package(scheme)) is not None:
            raise ValueError(f"urls: {url!r}: {why}")
    elif url == "-":
        raise ValueError("urls: '-' is standard input; a stream is read again in every epoch")


def open_address(url: str, remote: Remote) -> Any:
    """Open the bytes of an address as a file object, by its scheme; ``remote``: options for objects of a store."""
    scheme = scheme_of(url)
    if scheme == "pipe":
        return gopen_pipe(f"pipe:{url[5:]}")
    if scheme in PACKAGES:
        return open_object(url, remote)
    handle = os.open(local_path(url), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not hang the run
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("not a regular file")
    return os.fdopen(handle, "rb")


def one_line(error: Exception, url: str) -> str:
    """Describe an error of reading an address, in one line without the address."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, StoreError):
        return str(error)
    status = re.search(r"exit (\d+)", str(error))
    if status:
        return f"its command ended with exit status {status[1]}"
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.split()).replace(url, "it")[:160]
