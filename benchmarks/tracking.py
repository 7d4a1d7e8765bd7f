"""What tracking costs a step, and whether all arrives.

    python benchmarks/tracking.py [--json PATH] [--quick]

Steps are a 4x312 student's own: forward, backward, AdamW, on 8 rows of 64 tokens; every one logs 60 metrics,
ten times what a run logs that logs every tenth step. Ways take turns of some steps each:

off        nothing is logged
healthy    an MLflow server on this machine
slow       the same, each answer 5 s late
down       nobody listens

``calls`` is the time inside the calls that log, as a share of the step: what training waits. ``step`` is the
median step against that of ``off``; it holds what the threads of tracking take from the same cores too, and
the noise of the machine.

The second part kills the server again and again while points are logged, and compares what it holds in the
end with what was logged, point by point.
"""

import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

# isort: split
import torch
from transformers import BertConfig, BertModel

from benchmarks.harness import Report, parse_arguments
from benchmarks.tiny_run import free_port
from tests.trainer.mlflow_server import Server
from tests.trainer.test_tracking import points
from trainer.tracking import Run

SLOW_S = 5.0
KEYS = [f"loss/hidden/{index}" for index in range(60)]
POINTS_PER_S = 100


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments(__doc__)
    logging.getLogger("trainer").setLevel(logging.ERROR)  # outages are what this is about
    turns, steps, kills = (1, 5, 1) if arguments.quick else (12, 40, 20)
    report = Report("tracking 60 metrics a step")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        slow_port = int(free_port())
        context = multiprocessing.get_context("spawn")
        proxy = context.Process(target=serve_slowly, args=(slow_port, server.uri), daemon=True)
        proxy.start()
        uris = {
            "off": None,
            "healthy": server.uri,
            "slow": f"http://127.0.0.1:{slow_port}",
            "down": f"http://127.0.0.1:{free_port()}",
        }
        worst = cost(uris, Path(folder), turns, steps, report)
        proxy.kill()
        logged, wrong = outages(server, Path(folder), kills)
        server.kill()
    report.finish(
        f"tracking keeps a step waiting for {worst:.3%} of its time at most; of {logged} points through "
        f"{kills} kills of the server {wrong} are missing, doubled or changed",
        arguments.json,
    )


def cost(uris: dict[str, str | None], folder: Path, turns: int, steps: int, report: Report) -> float:
    """Add a row for every way, and return the largest share that calls take."""
    torch.manual_seed(0)
    shape = {"hidden_size": 312, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1200}
    model = BertModel(BertConfig(**shape, attention_probs_dropout_prob=0.0))
    optimizer = torch.optim.AdamW(model.parameters())
    ids_BS = torch.randint(1000, 30000, (8, 64))
    step_s: dict[str, list[float]] = {way: [] for way in uris}
    call_s: dict[str, list[float]] = {way: [] for way in uris}
    for turn in range(turns + 1):  # the first warms up
        for way, uri in uris.items():
            run = open_run(uri, folder / f"{way}-{turn}") if uri is not None else None
            for step in range(steps):
                begun_s = time.perf_counter()
                model(ids_BS).last_hidden_state.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                done_s = time.perf_counter()
                if run is not None:
                    run.log_metrics(dict.fromkeys(KEYS, 1.0 / (step + 1)), step)
                ended_s = time.perf_counter()
                if turn > 0:
                    step_s[way].append(ended_s - begun_s)
                    call_s[way].append(ended_s - done_s)
            if run is not None:
                run.finish(wait_s=0.1)
    own_s = statistics.median(step_s["off"])
    shares = {way: sum(call_s[way]) / sum(step_s[way]) for way in uris}
    for way in uris:
        median_s = statistics.median(step_s[way])
        longest_ms = 1e3 * max(call_s[way])
        report.add(
            way=way,
            step_ms=1e3 * median_s,
            step=f"{median_s / own_s - 1:+.2%}",
            calls=f"{shares[way]:.4%}",
            longest_call_ms=longest_ms,
        )
    return max(shares.values())


def outages(server: Server, folder: Path, kills: int) -> tuple[int, int]:
    """Kill the server so many times while points are logged; return how many there were, how many differ."""
    run = open_run(server.uri, folder / "outages")
    logged: list[tuple[int, float]] = []

    def log_for(seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            step = len(logged)
            logged.append((step, 1 / (step + 1)))
            run.log_metrics({"loss": logged[-1][1]}, step)
            time.sleep(1 / POINTS_PER_S)

    for _ in range(kills):
        log_for(3)
        server.kill()
        log_for(3)
        server.start()
    assert run.finish(wait_s=120) == 0, "entries are left"
    stored = points(server.uri, run.id, "loss")
    return len(logged), sum(a != b for a, b in zip(stored, logged, strict=False)) + abs(
        len(stored) - len(logged)
    )


def open_run(uri: str, folder: Path) -> Run:
    """Return a new run with its journal in ``folder``."""
    return Run.start(
        uri=uri,
        default_folder=folder,
        experiment="benchmark",
        name=folder.name,
        params={},
        tags={},
        journal=folder / "tracking",
    )


def serve_slowly(port: int, uri: str) -> None:
    """Pass requests on to ``uri``, each after ``SLOW_S``."""

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(SLOW_S)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = urllib.request.Request(f"{uri}{self.path}", body or None, method=self.command)
            asked.add_header("Content-Type", "application/json")
            try:
                with urllib.request.urlopen(asked) as answer:
                    code, said = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                code, said = error.code, error.read()
            with suppress(OSError):  # who asked may have given up
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    ThreadingHTTPServer(("127.0.0.1", port), Slow).serve_forever()


if __name__ == "__main__":
    main()
