"""An S3 server on loopback (moto, in a process of its own), and a small proxy in front of it that counts and fails.

The proxy forwards whole requests, so that a test says what the network does: a pause before each answer, a 503, or an
answer whose connection closes in the middle.
"""

import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
WAIT_S = 60
Fault = Callable[["Request"], "str | None"]


@dataclass(frozen=True)
class Request:
    """One request as the proxy sees it; `number` counts from 0."""

    number: int
    method: str
    path: str
    range: str | None


@dataclass
class Proxy:
    """What stands before the server; `most_open` requests were waiting in it at once.

    `fault(request)` may say `403`, `503`, `lose` (the answer, once the work is done), or `drop` (the connection, in the
    middle of an answer that is no error: obstore tries none of those again).
    """

    port: int
    delay_s: float = 0.0
    fault: Fault = lambda _: None
    requests: list[Request] = field(default_factory=list)
    received_bytes: int = 0
    num_open: int = 0
    most_open: int = 0

    def clear(self) -> None:
        self.delay_s, self.fault, self.received_bytes, self.most_open = 0.0, lambda _: None, 0, 0
        self.requests.clear()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving() -> Iterator[int]:
    """A moto server for the time of the block; its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + WAIT_S
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the S3 server of the tests did not start")
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


@contextmanager
def proxied(upstream: int) -> Iterator[Proxy]:
    """A proxy in front of the server at port `upstream`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, OSError):
                self.close_connection = True

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                request = Request(len(proxy.requests), self.command, self.path, self.headers.get("Range"))
                proxy.requests.append(request)
                proxy.num_open += 1
                proxy.most_open = max(proxy.most_open, proxy.num_open)
            time.sleep(proxy.delay_s)
            with lock:
                proxy.num_open -= 1
            fault = proxy.fault(request)
            if fault in ("403", "503"):
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            status, headers, answer = _ask(upstream, self.command, self.path, dict(self.headers), body)
            with lock:
                proxy.received_bytes += len(answer)
            if fault == "lose":
                self.close_connection = True
                return
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length") if self.command == "HEAD" else str(len(answer))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            drops = fault == "drop" and status < 400
            self.wfile.write(answer[: len(answer) // 2] if drops else answer)
            self.close_connection |= drops

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def _ask(port: int, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request(method, path, body=body, headers={**headers, "Connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()
    finally:
        connection.close()


def make_bucket(port: int, name: str) -> None:
    status, _, answer = _ask(port, "PUT", f"/{name}", {}, b"")
    assert status == 200, (status, answer)


def _answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def keys_of(requests: list[Request], method: str = "GET") -> list[str]:
    """What was asked for, below the bucket."""
    return [re.sub(r"^/[^/]+/", "", one.path) for one in requests if one.method == method]
