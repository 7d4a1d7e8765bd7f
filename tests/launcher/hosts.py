"""Hosts on this machine: namespaces with their own network, name, processes and mounts, joined by a switch.

Each runs its own sshd, so that pdsh and ssh go between them as between machines. Nothing is visible outside,
and all of it ends with the context.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

TOOLS = ("sshd", "ssh-keygen", "pdsh", "ip", "nft", "unshare", "nsenter")
SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SSH = """
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
SSHD = """
HostKey {folder}/hostkey
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
UsePAM no
StrictModes no
PidFile none
"""
# The mounts are the namespace's own. With the tmpfs on /run nothing there, such as name services, answers.
HOST = """
set -e
hostname {name}
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link set lo up
/usr/sbin/sshd -f {folder}/sshd_config
echo ready
sleep infinity & wait  # a shell: the first process of a host reaps what others leave
"""


class Hosts:
    """Hosts that run; make them with ``hosts``."""

    def __init__(self, folder: Path, names: tuple[str, ...], switch: int, inits: Mapping[str, int]) -> None:
        self.folder, self.names = folder, names
        self._switch, self._inits = switch, inits

    def address(self, host: str) -> str:
        """The address of a host's ``eth0``."""
        return f"10.99.0.{self.names.index(host) + 1}"

    def run(self, host: str, *command: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end; ``settings`` as of ``subprocess.run``."""
        settings = {"capture_output": True, "text": True, "timeout": 300, **settings}
        return subprocess.run(self._on(host, command, settings), **settings)

    def start(self, host: str, *command: str, **settings: Any) -> subprocess.Popen[str]:
        """Start a command on a host, ``settings`` as of ``subprocess.Popen``; it ends with the host."""
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **settings}
        return subprocess.Popen(self._on(host, command, settings), **settings)

    def _on(self, host: str, command: tuple[str, ...], settings: Mapping[str, Any]) -> list[str]:
        folder = settings.get("cwd") or Path.cwd()
        within = ["-t", str(self._inits[host]), "-n", "-u", "-m", "-p", f"--wd={folder}"]
        return ["nsenter", *within, "--", *command]

    def link(self, host: str, up: bool) -> None:
        """Take a host from the switch, or put it back. Its interface stays up: what it sends is lost."""
        port = f"port{self.names.index(host) + 1}"
        to = ["master", "switch"] if up else ["nomaster"]
        subprocess.run(["nsenter", "-t", str(self._switch), "-n", "ip", "link", "set", port, *to], check=True)

    @contextlib.contextmanager
    def replaced(self, host: str, what: Path, by: Path) -> Iterator[None]:
        """On this host alone, a file or folder is another one."""
        self.run(host, "mount", "--bind", str(by), str(what), check=True)
        try:
            yield
        finally:
            self.run(host, "umount", "-l", str(what), check=True)

    def processes(self, host: str, part: str, parent: str = "") -> list[psutil.Process]:
        """The processes of a host with ``part`` in its arguments, and ``parent`` in its parent's."""
        own = os.readlink(f"/proc/{self._inits[host]}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == own and part in " ".join(process.cmdline()):
                    above = process.parent()
                    found += [process] if above and parent in " ".join(above.cmdline()) else []
        return found


@contextlib.contextmanager
def hosts(folder: Path, names: tuple[str, ...] = ("node1", "node2")) -> Iterator[Hosts]:
    """Hosts of these names at 10.99.0.1 and on, files of theirs in ``folder``; skips where that cannot be."""
    _require()
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["127.0.0.1 localhost", *(f"10.99.0.{i} {name}" for i, name in enumerate(names, start=1))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "nsswitch.conf").write_text("passwd: files\nhosts: files\n")
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    for key in ("key", "hostkey"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(_namespace("echo ready; sleep infinity & wait"))
        within = ["nsenter", "-t", str(switch), "-n", "ip"]
        subprocess.run([*within, "link", "add", "switch", "type", "bridge"], check=True)
        subprocess.run([*within, "link", "set", "switch", "up"], check=True)
        inits = {}
        for number, name in enumerate(names, start=1):
            init = inits[name] = stack.enter_context(_namespace(HOST.format(name=name, folder=folder)))
            own, port = ["nsenter", "-t", str(init), "-n", "ip"], f"port{number}"
            pair = ["link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(init)]
            subprocess.run([*within, *pair], check=True)
            subprocess.run([*within, "link", "set", port, "master", "switch", "up"], check=True)
            subprocess.run([*own, "address", "add", f"10.99.0.{number}/24", "dev", "eth0"], check=True)
            subprocess.run([*own, "link", "set", "eth0", "up"], check=True)
        yield Hosts(folder, names, switch, inits)


@contextlib.contextmanager
def _namespace(script: str) -> Iterator[int]:
    """Namespaces in which a script runs; the process id of their first process, with which all others end."""
    unshare = ["unshare", "-n", "-u", "-m", "-p", "--fork", "--kill-child", "--mount-proc"]
    holder = subprocess.Popen(
        [*unshare, "--propagation", "private", "bash", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PATH": SYSTEM},
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        yield psutil.Process(holder.pid).children()[0].pid
    finally:
        holder.kill()
        holder.communicate()


def _require() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SYSTEM) is None]
    if missing:
        pytest.skip(
            f"hosts need {', '.join(missing)}: install openssh-server, pdsh, iproute2, nftables, util-linux"
        )
    tried = subprocess.run(
        ["unshare", "-n", "-u", "-m", "-p", "--fork", "true"], capture_output=True, text=True
    )
    if os.geteuid() != 0 or tried.returncode != 0:
        pytest.skip(f"hosts need root and namespaces: {tried.stderr.strip() or 'this is not root'}")
