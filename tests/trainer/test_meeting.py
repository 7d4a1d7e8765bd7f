"""How real processes meet on one host; on two: ``tests/launcher/test_hosts.py``."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from configs.schema import TimeoutConfig
from trainer import exits, meeting
from trainer.meeting import MeetingError, UnreachableError, first_line, lost_peer
from trainer.world import MARGIN_S, World, set_timeouts

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

RANK = """
import os, sys
from configs.schema import TimeoutConfig
from trainer import meeting, world
place, error, facts = world.find(os.environ), None, {"corpus": "abc"}
start_s = 30.0
EXTRA
try:
    meeting.connect(place, os.environ, TimeoutConfig(start_s=start_s), facts, error)
    print("met", os.environ["GLOO_SOCKET_IFNAME"])
    world.disconnect()
except (ValueError, OSError) as error:
    print(type(error).__name__, error)
    sys.exit(7)
"""


def meet(
    *ranks: int, size: int = 2, extra: str = "", port: int | None = None, **settings: str
) -> list[tuple[int, str]]:
    """Exit code and output of these ranks of a world on one host; they run ``extra`` before they connect."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = port or probe.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", **settings}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.replace("EXTRA", extra)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in ranks
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_ranks_on_one_host_listen_to_nothing_outside():
    listening = """
import psutil, trainer.meeting as m
connected = m.set_timeouts
def look(seconds):
    connected(seconds)
    print(*sorted({c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"}))
m.set_timeouts = look
"""
    outputs = meet(0, 1, extra=listening)
    assert outputs == [(0, "127.0.0.1\nmet lo\n")] * 2


def test_a_missing_rank_is_named():
    [(code, said)] = meet(0, size=3, extra="start_s = 2.0")
    assert code == 7
    assert said.startswith(
        "UnreachableError 1 of 3 ranks came within timeouts.start_s=2 s; missing: ranks 1-2."
    )


def test_a_rank_that_finds_nobody_says_so_itself():
    [(code, said)] = meet(1, extra="start_s = 2.0")
    assert code == 7 and said.startswith(
        f"UnreachableError rank 1 on {socket.gethostname()} has not reached rank 0"
    )
    assert "Connection refused" in said


def test_what_differs_ends_all_with_one_message():
    (first, said), other = meet(0, 1, extra="facts = {'corpus': 'abc' if place.is_main else 'def'}")
    assert first == 7 and f"- corpus: {socket.gethostname()} abc; {socket.gethostname()} def" in said
    assert other == (exits.WRONG, "")


@pytest.mark.parametrize(
    ("who", "text"),
    [("place.rank == 1", "no disk\n  (met by {} (rank 1))\n"), ("True", "no disk\n")],
    ids=["one", "all"],
)
def test_a_problem_is_told_by_rank_0(who, text):
    (first, said), other = meet(0, 1, extra=f"if {who}: error = OSError('no disk')")
    assert (first, said) == (7, "OSError " + text.format(socket.gethostname()))
    assert other == (exits.FAILED, "")


def test_a_rank_that_comes_twice_is_refused():
    """Both hosts were started as node 0; rank 1 never comes."""
    outputs = meet(1, 1, 0, size=3, extra="start_s = 4.0")
    assert sum("MeetingError rank 1 came twice" in said for _, said in outputs) == 1
    assert "2 of 3 ranks came" in outputs[2][1]


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        [(code, said)] = meet(0, port=other.getsockname()[1])
    assert code == 7 and said.startswith("UnreachableError rank 0 cannot listen at 127.0.0.1:")
    assert "Address already in use" in said


def test_an_interface_that_is_not_there_is_named():
    (first, said), other = meet(0, 1, GLOO_SOCKET_IFNAME="ib77")
    assert first == 7 and "MeetingError GLOO_SOCKET_IFNAME=ib77 names an interface" in said
    assert other == (exits.WRONG, "")


@pytest.fixture
def alone(monkeypatch):
    """This process, connected to nobody, by the loopback interface."""
    for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    place = World(0, 1, 0, 1, CPU)
    meeting.connect(place, {}, TimeoutConfig(start_s=100))
    yield place
    dist.destroy_process_group()
    os.environ.pop("GLOO_SOCKET_IFNAME")


def test_alone_nobody_is_waited_for(alone):
    listening = [c for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1"}
    assert dist.get_world_size() == 1


def test_timeouts_reach_every_group_those_to_come_included(alone):
    """What gloo itself was told, group by group; DeepSpeed makes groups without a timeout."""

    def timeouts():
        return [
            group._get_backend(CPU).options._timeout.total_seconds()
            for group in dist.distributed_c10d._world.pg_map
        ]

    dist.new_group()
    assert timeouts() == [100 + MARGIN_S] * 2
    set_timeouts(5)
    dist.new_group()
    assert timeouts() == [5 + MARGIN_S] * 3


def test_alone_a_problem_is_raised_as_it_is():
    problem = ValueError("wrong")
    with pytest.raises(ValueError, match="wrong") as caught:
        meeting.connect(World(0, 1, 0, 1, CPU), {}, problem=problem)
    assert caught.value is problem
    with pytest.raises(ValueError, match="wrong"):
        meeting.or_tell(World(0, 1, 0, 1, CPU), {}, None, lambda: (_ for _ in ()).throw(problem))
    assert meeting.or_tell(World(0, 1, 0, 1, CPU), {}, None, lambda: 3) == 3


@pytest.mark.parametrize(
    "text",
    [  # as they came when ranks were killed
        "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:43953: "
        "Connection reset by peer. This is typically caused by a remote worker hanging or bugs",
        "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:8366. This is typically caused by a remote worker crashing.",
        "[/gloo/transport/tcp/unbound_buffer.cc:77] Timed out waiting 5000ms for recv operation to complete",
    ],
)
def test_errors_of_a_lost_peer_are_known(text):
    assert lost_peer(RuntimeError(text))
    assert first_line(RuntimeError(text))[0] in "RCT" and "typically" not in first_line(RuntimeError(text))


def test_other_errors_are_no_lost_peer():
    assert lost_peer(UnreachableError("gone")) and lost_peer(dist.DistNetworkError("Broken pipe"))
    for error in (
        RuntimeError("CUDA out of memory"),
        MeetingError("ranks differ"),
        ConnectionError("http"),
        ValueError(),
    ):
        assert not lost_peer(error)
