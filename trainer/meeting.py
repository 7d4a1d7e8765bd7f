"""How ranks meet: through a store on rank 0's host, where each says who it is before any collective.

A collective that a rank does not reach is silence, and ranks that differ in code or corpus go wrong later, or
never visibly. So first every rank leaves a record of itself in the store. Rank 0 waits for all of them,
compares, and leaves a verdict that all read: who is missing, what differs, named by host.
"""

import errno
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from configs.schema import TimeoutConfig
from trainer import exits, interfaces
from trainer.rollcall import Record, Verdict, judge, missing
from trainer.world import World, address, set_timeouts, sum_over_ranks

log = logging.getLogger("distil")

Result = TypeVar("Result")

WAIT_LINE_S = 30.0
"""Every so often a rank that waits says for what."""
STORE_S = 60.0
"""Longest wait for an answer of the store."""
CONNECT_S = 120.0
"""Longest wait of ranks that have all checked in for connections to each other; gloo tries several times."""
_LOST = re.compile(
    r"closed by peer|[Cc]onnection reset|[Cc]onnection refused|Broken pipe|Failed to recv|likely closed|"
    r"Timed out waiting|[Tt]imed out after|wait timeout|\[\S*gloo/|Gloo \w+ failed|"
    r"remote process exited|ncclRemoteError|ncclSystemError|NCCL communicator was aborted"
)


class MeetingError(ValueError):
    """Ranks that cannot train together: wrong settings, or a difference between them."""


class UnreachableError(ConnectionError):
    """Ranks did not come, or cannot reach each other; that may heal, so the run may be started again."""


def connect(
    place: World,
    environment: Mapping[str, str],
    timeouts: TimeoutConfig | None = None,
    facts: Mapping[str, str] | None = None,
    problem: Exception | None = None,
) -> None:
    """Let all ranks meet and form the process group (collective): NCCL on CUDA, gloo on CPU.

    Where GLOO_SOCKET_IFNAME does not name one, gloo uses the loopback interface if all ranks are on one host,
    else the interface by which this host reaches rank 0's.

    Args:
        place: this rank.
        environment: names the meeting point, see ``world.address``; a single process needs none.
        timeouts: how long the others are waited for; not given: the schema's defaults.
        facts: what must be equal on all ranks, by name, such as versions and fingerprints.
        problem: what this rank has met already; it ends all ranks, with one message.

    Raises:
        MeetingError: settings are wrong, or ranks differ.
        UnreachableError: ranks did not come in time, or cannot reach each other.
        SystemExit: on the other ranks, where rank 0 raises what all have met.
    """
    start_s = (timeouts or TimeoutConfig()).start_s
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed reads it
    if place.size == 1 and "MASTER_ADDR" not in environment:
        if problem is not None:
            raise problem
        _form(place, dist.HashStore(), "127.0.0.1", "", start_s)
        return
    key = f"{_backend(place).upper()}_SOCKET_IFNAME"
    store, own = _store(place, environment, start_s)
    if place.size == place.local_size:
        own = "127.0.0.1"  # nothing listens to the outside without need
    if problem is None and (wrong := interfaces.wrong(key, environment.get(key), own)):
        problem = MeetingError(wrong)
    verdict = _check_in(store, _record(place, own, environment.get(key), facts or {}, problem), start_s)
    if verdict.code != exits.DONE:
        _end(place, verdict, problem)
    if place.size > place.local_size and verdict.outside and interfaces.is_loopback(own):
        own = interfaces.towards(verdict.outside)  # this host's name leads to itself, as in Debian
    _form(place, store, own, verdict.table, start_s)


def _form(place: World, store: dist.Store, own: str, table: str, start_s: float) -> None:
    """Form the process group of ranks that have met, and see that they reach each other (collective)."""
    backend = _backend(place)
    if backend == "gloo" and "GLOO_SOCKET_IFNAME" not in os.environ and (name := interfaces.named(own)):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    timeout = timedelta(seconds=min(start_s, CONNECT_S))
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
        assert sum_over_ranks(torch.ones(1, device=place.device)).item() == place.size
    except RuntimeError as error:
        if not first_to_say(store):
            raise SystemExit(exits.LOST) from error
        raise UnreachableError(
            f"all {place.size} ranks have met, but cannot reach each other over {backend}: "
            f"{first_line(error)}\n{table}\nInterfaces on {socket.gethostname()}: {interfaces.listed()}. Set "
            f"{backend.upper()}_SOCKET_IFNAME to the one that leads to the other hosts (deepspeed: in "
            ".deepspeed_env), and let firewalls pass all TCP ports between the hosts"
        ) from error
    set_timeouts(start_s)


def _backend(place: World) -> str:
    return "nccl" if place.device.type == "cuda" else "gloo"


def or_tell(
    place: World, environment: Mapping[str, str], timeouts: TimeoutConfig | None, action: Callable[[], Result]
) -> Result:
    """Return what ``action`` returns; what it raises on any rank is told to all, and ends them.

    For what each rank does by itself before they meet: it may fail on one host alone.
    """
    try:
        return action()
    except (ValueError, OSError) as error:
        connect(place, environment, timeouts, problem=error)
        raise


def lost_peer(error: BaseException) -> bool:
    """Say whether ``error`` means that another rank, or the way to it, was lost.

    Gloo and NCCL have no error class of their own for it: they are known by their words.
    """
    return isinstance(error, UnreachableError | dist.DistNetworkError | dist.DistStoreError) or (
        isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    )


def first_to_say(store: dist.Store | None = None) -> bool:
    """Say whether no other rank has asked before, so that one of those that lost a peer speaks for all.

    Where rank 0 is gone, and its store with it, all of them speak.
    """
    try:
        store = store or dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=10))
        return int(store.add("lost", 1)) == 1
    except (RuntimeError, ValueError):
        return True


def _store(place: World, environment: Mapping[str, str], limit_s: float) -> tuple[dist.Store, str]:
    """Return the store, and this host's address on the way to it. torchrun's agents keep one already."""
    try:
        host, port = address(environment)
    except ValueError as error:
        raise MeetingError(str(error)) from error
    kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listener = _listen(host, port, place) if place.is_main and not kept else None
    own = _reach(host, port, place, limit_s)
    try:
        store: dist.Store = dist.TCPStore(
            host,
            port,
            is_master=listener is not None,
            timeout=timedelta(seconds=STORE_S),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener is not None else None,
        )
    except RuntimeError as error:
        raise UnreachableError(
            f"what answers at {host}:{port} is not rank 0 of this run: {first_line(error)}; give another "
            "--master_port (MASTER_PORT)"
        ) from error
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}", store), own


def _listen(host: str, port: int, place: World) -> socket.socket:
    """Return rank 0's socket, which listens at the one address that the others are told."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if place.size > place.local_size and interfaces.is_loopback(str(where[0])):
            where = ("", port)  # its own name leads to itself, as in Debian; the others know another address
        try:
            return socket.create_server(where[:2], family=family, backlog=2048)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return socket.create_server(("", port), backlog=2048)  # such as a service's virtual address
    except socket.gaierror as error:
        raise _unknown(host, error) from error
    except OSError as error:
        raise UnreachableError(
            f"rank 0 cannot listen at {host}:{port} on {socket.gethostname()}: {error.strerror}. If "
            "another run, or what is left of one, holds the port (ss -ltnp), wait for its end, or give "
            "another --master_port (MASTER_PORT)"
        ) from error


def _reach(host: str, port: int, place: World, limit_s: float) -> str:
    """Wait until the meeting point answers; return this host's address on the way to it."""
    began = said = time.monotonic()
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                return str(connection.getsockname()[0])
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN:
                raise _unknown(host, error) from error
            cause: OSError = error
        except OSError as error:
            cause = error
        now = time.monotonic()
        text = (
            f"rank {place.rank} on {socket.gethostname()} has not reached rank 0 at {host}:{port} for "
            f"{now - began:.0f} s: {cause.strerror or cause}{_resolved(host, place)}"
        )
        if now - began > limit_s:
            raise UnreachableError(
                f"{text}. Refused: rank 0 has not started there, or has ended; see its messages, and that "
                "MASTER_ADDR (--master_addr) names the host of rank 0. No answer, no route: a firewall that "
                f"does not let TCP port {port} through, or another network: see that this host reaches that "
                "address. timeouts.start_s says how long to wait"
            )
        if now - said > WAIT_LINE_S and place.local_rank == 0:
            said = now
            log.error("%s; waiting", text)
        time.sleep(0.2)


def _resolved(host: str, place: World) -> str:
    """Say what a host name leads to, where that may be the reason."""
    try:
        found = str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        return ""
    if interfaces.is_loopback(found) and place.size > place.local_size:
        return f" ({host} is {found} here, this host itself: correct /etc/hosts, or give an address)"
    return "" if found == host else f" ({host} is {found} here)"


def _check_in(store: dist.Store, record: Record, limit_s: float) -> Verdict:
    """Leave the record of this rank, and return the verdict on all of them."""
    rank, size = record.rank, record.size
    try:
        if store.add(f"came/{rank}", 1) > 1:
            raise MeetingError(
                f"rank {rank} came twice, this time from {record.host}: two processes have the same rank. "
                "Give every host its own --node_rank, and start the run once"
            )
        store.set(f"record/{rank}", json.dumps(asdict(record)))
        if rank != 0:
            if not _wait(store, ["verdict"], limit_s + STORE_S, f"rank {rank} waits for rank 0's verdict"):
                raise UnreachableError(f"rank {rank} on {record.host} checked in, but rank 0 says nothing")
            verdict = Verdict(**json.loads(store.get("verdict")))
            store.add("read", 1)
            return verdict
        _wait(
            store,
            [f"record/{other}" for other in range(size)],
            limit_s,
            "waiting for other ranks to check in",
        )
        came = [other for other in range(size) if store.check([f"record/{other}"])]
        records = [Record(**json.loads(text)) for text in store.multi_get([f"record/{r}" for r in came])]
        verdict = judge(records) if len(came) == size else missing(records, limit_s)
        store.set("verdict", json.dumps(asdict(verdict)))
        deadline = time.monotonic() + 10
        while verdict.code and store.add("read", 0) < len(came) - 1 and time.monotonic() < deadline:
            time.sleep(0.05)  # the store ends with this process
        return verdict
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UnreachableError(
            f"rank {rank} on {record.host} lost rank 0 while ranks checked in: {first_line(error)}. See the "
            "messages of rank 0"
        ) from error


def _wait(store: dist.Store, keys: list[str], limit_s: float, doing: str) -> bool:
    """Wait until all ``keys`` are there; False when they are not after ``limit_s``.

    By asking, not in the store's own wait, during which this process would heed no signal.
    """
    began = said = time.monotonic()
    while not store.check(keys):
        now = time.monotonic()
        if now - began > limit_s:
            return False
        if now - said > WAIT_LINE_S:
            said = now
            here = sum(store.check([key]) for key in keys)
            log.info("%s: %d of %d are here after %.0f s", doing, here, len(keys), now - began)
        time.sleep(min(1.0, 0.02 + (now - began) / 20))
    return True


def _record(
    place: World, own: str, interface: str | None, facts: Mapping[str, str], problem: Exception | None
) -> Record:
    return Record(
        rank=place.rank,
        size=place.size,
        host=socket.gethostname(),
        local_rank=place.local_rank,
        local_size=place.local_size,
        device=place.device.type,
        interface=interface or interfaces.named(own) or "",
        address=interfaces.address(interface) or own if interface else own,
        facts=dict(facts),
        problem=None if problem is None else str(problem),
        code=exits.WRONG if problem is None else exits.of(problem),
    )


def _end(place: World, verdict: Verdict, problem: Exception | None) -> NoReturn:
    if not place.is_main:
        raise SystemExit(verdict.code)
    if problem is not None and verdict.message == str(problem):
        raise problem
    kinds = {exits.WRONG: MeetingError, exits.LOST: UnreachableError, exits.FAILED: OSError}
    raise kinds[verdict.code](verdict.message)


def _unknown(host: str, error: OSError) -> MeetingError:
    return MeetingError(
        f"MASTER_ADDR={host} is no host that {socket.gethostname()} knows ({error.strerror}); give "
        "--master_addr (MASTER_ADDR) a name that all hosts resolve, or an address"
    )


def first_line(error: BaseException) -> str:
    """Return what an error of torch or gloo says, without the place in their sources and their advice."""
    return re.sub(
        r"\[\S*\.(?:cc|h):\d+\] *|\. This is typically.*|\n.*", "", str(error).strip(), flags=re.DOTALL
    )
