"""The hostfile of a ``deepspeed`` launch command, without the hosts that do not answer."""

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REACH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")


def find(command: Sequence[str]) -> Path | None:
    """Return the hostfile that a launch command names; None if it names none."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word in ("--hostfile", "-H"):
            return Path(following)
        if word.startswith("--hostfile="):
            return Path(word.partition("=")[2])
    return None


def read(path: Path) -> dict[str, str]:
    """Return the lines of a hostfile by host, in order, without comments."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {line.split()[0]: line for line in lines if line}


def answering(names: Sequence[str]) -> list[str]:
    """Return those of ``names`` on which ssh runs a command, in their order; asked all at once."""

    def answers(name: str) -> bool:
        asked = subprocess.run([*REACH, name, "true"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return asked.returncode == 0

    with ThreadPoolExecutor(max(1, min(64, len(names)))) as pool:
        return [name for name, there in zip(names, pool.map(answers, names), strict=True) if there]


def narrowed(command: Sequence[str], old: Path, new: Path, names: Sequence[str]) -> list[str]:
    """Write the lines of hostfile ``old`` that are of ``names`` to ``new``; return the command with it.

    A ``--master_addr`` that is no longer among the hosts becomes the first of them.
    """
    lines = read(old)
    new.write_text("".join(f"{lines[name]}\n" for name in names), encoding="utf-8")
    changed = [word.replace(str(old), str(new)) for word in command]
    for index, word in enumerate(changed[:-1]):
        if word == "--master_addr" and changed[index + 1] in lines.keys() - set(names):
            changed[index + 1] = names[0]
    return changed
