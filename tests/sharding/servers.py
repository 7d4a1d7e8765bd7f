"""Real servers on loopback for the tests of remote corpora, and a proxy that injects faults before them."""

import http.client
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

NGINX = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[int]:
    """A real nginx that serves the files under ``root``; gives its port."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.fail("nginx is not installed; `apt-get install nginx-light` (Debian), or the like")
    port = free_port()
    user = "user root;" if os.getuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(user=user, folder=folder, port=port, root=root))
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(config)])
    try:
        while True:  # ends by the test's timeout
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "error.log").read_text()
            time.sleep(0.01)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@contextmanager
def s3(root: Path, bucket: str) -> Iterator[int]:
    """A server of the S3 protocol (moto's) with the files under ``root`` in a bucket; gives its port."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket=bucket)
        for path in root.rglob("*"):
            if path.is_file():
                client.put_object(Bucket=bucket, Key=str(path.relative_to(root)), Body=path.read_bytes())
        yield port
    finally:
        server.stop()


@dataclass(frozen=True)
class Request:
    """A request that passed the proxy."""

    method: str
    path: str
    range: str | None


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server, except where ``plan`` names a fault for one.

    Faults: ``drop`` (the connection is reset in the middle of the body), ``503``, ``429``, ``404``, ``403``,
    ``slow`` (the body trickles), ``truncate`` and ``lengthen`` (a body of another length, as its header
    says), ``wrong`` (a flipped bit), ``hang`` (no answer until the client goes), ``whole`` (ranges ignored).
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.port = self.server_address[1]
        self.guard = threading.Lock()
        self.plan: Callable[[Request], str | None]
        self.reset()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self) -> None:
        """Forget all requests; no faults."""
        self.plan = lambda request: None
        self.seen: list[tuple[Request, str | None]] = []

    def fault(self, request: Request) -> str | None:
        """Note a request, and what is to befall it."""
        with self.guard:
            self.seen.append((request, self.plan(request)))
            return self.seen[-1][1]

    @property
    def injected(self) -> list[Request]:
        """The requests that met with a fault."""
        with self.guard:
            return [request for request, kind in self.seen if kind is not None]

    @property
    def reads(self) -> list[Request]:
        """The requests for parts of shards."""
        with self.guard:
            return [request for request, _ in self.seen if request.range is not None]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go are what is tested here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        fault = self.server.fault(Request(self.command, self.path, self.headers["Range"]))
        if fault == "hang":
            self.connection.recv(1)
            self.close_connection = True
            return
        if fault in ("503", "429", "404", "403"):
            self.answer(int(fault), {"Retry-After": "0"}, b"")
            return
        kept = {key: text for key, text in self.headers.items() if key.lower() != "connection"}
        if fault == "whole":
            kept.pop("Range", None)
        # A connection of its own: one that is kept may be closed at the other end, one more fault.
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        upstream.request(self.command, self.path, headers=kept)
        response = upstream.getresponse()
        body = response.read()
        upstream.close()
        if fault == "truncate":
            body = body[: len(body) // 2]
        elif fault == "lengthen":
            body += b"more"
        elif fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.answer(response.status, dict(response.getheaders()), body, fault)

    def answer(self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None) -> None:
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_response_only(status)
        for key, text in headers.items():
            if key.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(key, text)
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "slow":
            for start in range(0, len(body), 1 + len(body) // 10):
                self.wfile.write(body[start : start + 1 + len(body) // 10])
                time.sleep(0.01)
        elif fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            # A reset overtakes what was not read yet, and a kept connection that ends without an answer is
            # opened again by aiohttp itself.
            time.sleep(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self.wfile.write(body)
