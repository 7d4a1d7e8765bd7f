"""Network interfaces of this host: which has an address, which one an environment variable asks for."""

import ipaddress
import socket

import psutil


def named(own: str) -> str | None:
    """Return the interface that has this address; the loopback interface for all of its addresses."""
    if is_loopback(own):
        own = "127.0.0.1"
    found = (name for name, at in psutil.net_if_addrs().items() if own in [a.address for a in at])
    return next(found, None)


def address(name: str) -> str | None:
    """Return the first IPv4 address of an interface; None without."""
    return next((a.address for a in psutil.net_if_addrs().get(name, []) if a.family == socket.AF_INET), None)


def is_loopback(text: str) -> bool:
    """Return True for an address that leads to this host itself, wherever it is used."""
    return ipaddress.ip_address(text.partition("%")[0]).is_loopback


def towards(other: str) -> str:
    """Return this host's own address on the way to another; nothing is sent."""
    family = socket.AF_INET6 if ":" in other else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return str(probe.getsockname()[0])


def listed() -> str:
    """Return the interfaces with their IPv4 addresses, for people: ``lo 127.0.0.1, eth0 10.0.0.1``."""
    every = psutil.net_if_addrs().items()
    ipv4 = ((name, [a.address for a in at if a.family == socket.AF_INET]) for name, at in every)
    return ", ".join(" ".join([name, *addresses]) for name, addresses in ipv4)


def wrong(variable: str, value: str | None, own: str) -> str | None:
    """Return what is wrong with an interface that the environment asks for; None when nothing is.

    Gloo takes names, with commas between them; NCCL takes prefixes, ``=name`` and ``^name`` (all but it).
    ``own`` is this host's address on the way to rank 0.
    """
    there, host = psutil.net_if_addrs(), socket.gethostname()
    way_out = f"there are: {listed()}. Set it to the one that leads to the other hosts, or unset it"
    if value is None or value.startswith("^"):
        return None
    for name in value.removeprefix("=").split(","):
        by_prefix = variable.startswith("NCCL") and not value.startswith("=")
        known = any(other == name or by_prefix and other.startswith(name) for other in there)
        if name and not known:
            return f"{variable}={value} names an interface that {host} does not have; {way_out}"
    if not is_loopback(own) and is_loopback(address(value) or own):
        return f"{variable}={value} leads to {host} itself alone, but the run has other hosts; {way_out}"
    return None
