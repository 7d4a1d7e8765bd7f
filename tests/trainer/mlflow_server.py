"""A real ``mlflow server`` that tests start, kill and start again."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """``mlflow server`` on a free loopback port, in a process group of its own; SQLite if not told else."""

    def __init__(self, folder: Path, options: Sequence[str] = (), **environment: str) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None
        own = ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
        own += ["--artifacts-destination", str(folder / "artifacts")]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port]
        self._command = [*command, "--workers", "1", *(options or own)]
        self._environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}

    def start(self) -> None:
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self._answers, "the server to answer")

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "the server ended"
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def proxy(uri: str, refuses: Callable[[str, str, int], int]) -> Iterator[str]:
    """Stands before a server, as nginx does; yields its own URI.

    Args:
        uri: of the server.
        refuses: told method, path and bytes of a request; returns the status of its answer, 0 to pass it on.
    """

    class Between(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if status := refuses(self.command, self.path, len(body)):
                self.send_error(status)
                return
            passed = {key: self.headers[key] for key in ("Content-Type",) if key in self.headers}
            request = urllib.request.Request(uri + self.path, body or None, passed, method=self.command)
            try:
                answer = urllib.request.urlopen(request, timeout=30)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                content = answer.read()
                self.send_response(answer.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Between) as between:
        threading.Thread(target=between.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{between.server_port}"
        between.shutdown()


def wait_for(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120  # against a hang, not a measurement
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)
