"""Network interfaces of this host: which has an address, which one an environment variable asks for."""

import ipaddress
import socket

import psutil


def named(address: str) -> str | None:
    """Return the interface that has ``address``; the loopback interface for all of its addresses."""
    if is_loopback(address):
        address = "127.0.0.1"
    found = (name for name, at in psutil.net_if_addrs().items() if address in [a.address for a in at])
    return next(found, None)


def is_loopback(address: str) -> bool:
    """Return True for an address that leads to this host itself, wherever it is used."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def towards(address: str) -> str:
    """Return this host's own address on the way to another; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def listed() -> str:
    """Return the interfaces with their IPv4 addresses, for people: ``lo 127.0.0.1, eth0 10.0.0.1``."""
    every = psutil.net_if_addrs().items()
    ipv4 = ((name, [a.address for a in at if a.family == socket.AF_INET]) for name, at in every)
    return ", ".join(" ".join([name, *addresses]) for name, addresses in ipv4)


def wrong(variable: str, value: str | None) -> str | None:
    """Return what is wrong with an interface that the environment asks for; None when nothing is.

    Gloo takes names, with commas between them; NCCL takes prefixes, ``=name`` and ``^name`` (all but it).
    """
    there = psutil.net_if_addrs()
    for name in (value or "").removeprefix("=").split(","):
        by_prefix = variable.startswith("NCCL") and not (value or "").startswith("=")
        known = any(other == name or by_prefix and other.startswith(name) for other in there)
        if name and not name.startswith("^") and not known:
            return (
                f"{variable}={value} names an interface that {socket.gethostname()} does not have; there "
                f"are: {listed()}. Set it to the one that leads to the other hosts, or unset it"
            )
    return None
