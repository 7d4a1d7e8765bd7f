"""Folders and files that are there whole or not at all, and what a file holds."""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, beside ``final``. It gets that name when all went well, and is removed when not."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        install_folder(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def install_folder(partial: Path, final: Path) -> None:
    """Give a complete folder its final name, in place of the one that may bear it.

    The old folder steps aside first and goes last: whatever happens in between, one complete folder exists.
    Both must be on one file system.
    """
    aside = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[BinaryIO]:
    """A file to fill, beside ``final``. It gets that name when all went well, and is removed when not.

    Its own name is unique (``UNFINISHED`` matches it): processes that write the same file do not meet, and
    the last one's stays.
    """
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(final)
        sync(final.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


UNFINISHED = ".*.tmp"
"""Glob for what killed processes left of a ``new_file``."""


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: the old content stays until the new is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Return the descriptor that holds the lock of ``path`` (made), None while another process holds it.

    A lock of the kernel, by process (POSIX), not a file that could be left behind: it goes when the process
    does, however it ends, or when the descriptor is closed; none is ever stale, and children do not inherit
    it. The file names the holder. Where the file system has no locks, a warning is all.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None
    except OSError as error:
        log.warning("%s cannot be locked (%s): make sure that only one process works there", path, error)
    job = os.environ.get("SLURM_JOB_ID")
    named = f"{socket.gethostname()}, pid {os.getpid()}" + (f", Slurm job {job}" if job else "")
    with contextlib.suppress(OSError):  # a full disk costs the name
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, named.encode(), 0)
    return descriptor


def lock_holder(path: Path) -> str:
    """Return what ``try_lock`` wrote about the process that holds, or held last, the lock of ``path``."""
    return path.read_text(encoding="utf-8").strip() or "unknown"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
