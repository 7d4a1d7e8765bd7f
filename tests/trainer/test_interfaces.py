"""``trainer/interfaces.py``: interfaces of this host, against what the kernel lists."""

import socket

import pytest

from trainer import interfaces


def test_the_loopback_interface_has_all_loopback_addresses():
    assert interfaces.named("127.0.0.1") == interfaces.named("127.0.1.1") == interfaces.named("::1") == "lo"
    assert interfaces.address("lo") == "127.0.0.1"
    assert interfaces.towards("127.0.0.1") == "127.0.0.1"
    assert "lo 127.0.0.1" in interfaces.listed()


def test_what_nobody_has():
    assert interfaces.named("203.0.113.7") is None and interfaces.address("ib77") is None


@pytest.mark.parametrize(
    ("text", "loopback"), [("127.0.1.1", True), ("::1", True), ("10.0.0.1", False), ("fe80::1%eth0", False)]
)
def test_loopback_addresses(text, loopback):
    assert interfaces.is_loopback(text) is loopback


def test_every_interface_of_the_kernel_may_be_asked_for():
    for _, name in socket.if_nameindex():
        assert interfaces.wrong("GLOO_SOCKET_IFNAME", name, "127.0.0.1") is None
    assert interfaces.wrong("GLOO_SOCKET_IFNAME", None, "10.0.0.1") is None


@pytest.mark.parametrize("value", ["lo", "=lo", "l", "^docker", "^ib,docker", "lo,l"])
def test_nccl_takes_prefixes_and_exclusions(value):
    assert interfaces.wrong("NCCL_SOCKET_IFNAME", value, "127.0.0.1") is None


@pytest.mark.parametrize(
    ("variable", "value"), [("GLOO", "l"), ("NCCL", "=l"), ("GLOO", "lo,ib77"), ("NCCL", "ib")]
)
def test_an_interface_that_is_not_there_is_named(variable, value):
    message = interfaces.wrong(f"{variable}_SOCKET_IFNAME", value, "127.0.0.1")
    assert (
        f"{variable}_SOCKET_IFNAME={value} names an interface that {socket.gethostname()} does not have"
        in message
    )
    assert "there are: lo 127.0.0.1" in message


def test_the_loopback_interface_does_not_lead_to_other_hosts():
    message = interfaces.wrong("GLOO_SOCKET_IFNAME", "lo", "10.0.0.1")
    assert "GLOO_SOCKET_IFNAME=lo leads to" in message and "but the run has other hosts" in message
