"""Object stores on loopback with injected faults: an HTTP server, and moto's S3 server where it is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

#: What may go wrong with one answer: a status, a body that breaks off, a shorter one whose length says so, a stall.
Fault = int | str | None
#: (method, path, first byte, number of the request) -> what goes wrong with it.
Faults = Callable[[str, str, int, int], Fault]
BUCKET = "bucket"
KEY, SECRET = "AKIDNOTWRITTEN", "secret+not/written"
#: Packages of the S3 tests, 155 MB: `make stores` installs them.
S3 = ("moto", "s3fs", "flask")
without_s3 = next((name for name in S3 if importlib.util.find_spec(name) is None), None)


def no_faults(method: str, path: str, at: int, number: int) -> Fault:
    return None


def some(share: float, kinds: Iterable[Fault] = (500, 503, "cut", "short"), seed: int = 0) -> Faults:
    """A fault in a share of the answers."""
    rng, every, lock = random.Random(seed), list(kinds), threading.Lock()

    def fault(method: str, path: str, at: int, number: int) -> Fault:
        with lock:
            return rng.choice(every) if rng.random() < share else None

    return fault


class Store:
    """Objects by name, the requests that came, and the faults that were injected.

    Args:
        scheme: http or s3. ranges: whether parts of an object are given.
    """

    def __init__(self, scheme: str, ranges: bool = True) -> None:
        self.scheme, self.ranges = scheme, ranges
        self.objects: dict[str, bytes] = {}
        self.fault: Faults = no_faults
        self.stall = 30.0
        self.password: str | None = None
        self.tags = True
        self.requests: list[tuple[str, str, int]] = []
        self.injected: list[Fault] = []
        self.lock = threading.Lock()
        self.port = 0

    def url(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}" if self.scheme == "s3" else f"http://127.0.0.1:{self.port}/{name}"

    def put(self, name: str, data: bytes) -> str:
        self.objects[name] = data
        if self.scheme == "s3":
            import fsspec

            fsspec.filesystem("s3").pipe_file(f"{BUCKET}/{name}", data)
        return self.url(name)

    def reset(self) -> Store:
        self.fault, self.stall, self.password, self.tags = no_faults, 30.0, None, True
        self.objects.clear()
        self.requests.clear()
        self.injected.clear()
        return self

    def gets(self) -> int:
        """Requests for bytes since this was last asked."""
        with self.lock:
            count = sum(method == "GET" for method, _, _ in self.requests)
            self.requests.clear()
        return count

    def next_fault(self, method: str, path: str, header: str | None) -> Fault:
        span = re.match(r"bytes=(\d+)-", header or "")
        at = int(span[1]) if span else 0
        with self.lock:
            self.requests.append((method, path, at))
            number = len(self.requests)
        fault = self.fault(method, path, at, number)
        self.injected += [fault] if fault is not None else []
        return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        name, store = self.path.lstrip("/"), self.store
        fault = store.next_fault(method, self.path, self.headers.get("Range"))
        data = store.objects.get(name)
        if store.password is not None and self.headers.get("Authorization") != store.password:
            fault = 401
        if data is None or isinstance(fault, int):
            self._empty(fault if isinstance(fault, int) else 404)
            return
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        if self.headers.get("If-Match", tag) != tag:
            self._empty(412)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "") if store.ranges else None
        body = data[int(span[1]) : int(span[2]) + 1] if span else data
        if fault == "short" and method == "GET":
            body = body[: len(body) // 2]
        if fault == "stall":
            time.sleep(store.stall)
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(body) - 1}/{len(data)}")
        if store.tags:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if method == "GET":
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection |= fault == "cut"

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """The client has closed the connection."""


@contextmanager
def http_store(ranges: bool = True) -> Iterator[Store]:
    store = Store("http", ranges)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    store.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_store() -> Iterator[Store]:
    """moto's server behind the same faults; the environment says where it is, and has its credentials."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    store, backend = Store("s3"), DomainDispatcherApplication(create_backend_app)

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            pass

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        reads = method in ("GET", "HEAD")
        fault = store.next_fault(method, environ["PATH_INFO"], environ.get("HTTP_RANGE")) if reads else None
        if isinstance(fault, int):
            body = b"" if method == "HEAD" else b"<Error><Code>%s</Code></Error>" % _CODES.get(fault, b"InternalError")
            start(f"{fault} Injected", [("Content-Length", str(len(body))), ("Content-Type", "application/xml")])
            return [body]
        if fault == "stall":
            time.sleep(store.stall)
        answer: list[Any] = []
        body = b"".join(backend(environ, lambda status, headers, *_: answer.extend((status, headers))))
        if fault == "short" and method == "GET":
            body = body[: len(body) // 2]
            answer[1] = [(k, str(len(body)) if k.lower() == "content-length" else v) for k, v in answer[1]]
        start(*answer)
        return _broken(body) if fault == "cut" and method == "GET" else [body]

    server = make_server("127.0.0.1", 0, application, True, request_handler=Quiet)
    store.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    place = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{store.port}", "AWS_DEFAULT_REGION": "us-east-1"}
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    with mock.patch.dict(os.environ, {**place, **keys}):
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            os.environ.pop(name, None)
        try:
            import fsspec

            fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another server
            fsspec.filesystem("s3").mkdir(BUCKET)
            store.requests.clear()
            yield store
        finally:
            server.shutdown()
            server.server_close()


_CODES = {403: b"AccessDenied", 404: b"NoSuchKey", 503: b"SlowDown"}


def _broken(body: bytes) -> Iterator[bytes]:
    """Half a body; then the connection is closed."""
    yield body[: len(body) // 2]
    raise ConnectionAbortedError("injected")
