"""The cache of remote corpora on a node's own disk, shared by all processes and jobs of the node.

Its folder is the truth, and holds nothing that a crash could leave wrong:

- an entry is a file under its final name, complete, as it was renamed there; what reads it compares
  checksums, so that nothing need be synced to disk;
- ``partial/<name>`` is an entry in the making. Who makes it holds a flock on it, and who wants it too waits
  for that lock. The lock of a process that dies is free: the next one makes the entry from the start, and
  what nobody wants any more is swept up;
- space is taken (``posix_fallocate``) before an entry is made, under a flock on ``used``, a file with the
  bytes held: those found when the folder was last counted, and those taken since. A crash can only make that
  number too high, and a folder is counted before anything is evicted. So the budget holds at any time.

What was used longest ago (mtime) is evicted first; a reader has its file open, so that it may go at any time.
A disk that is full, read-only or missing costs the caching, not the reading: it is warned of once.
"""

import contextlib
import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

KEPT_SHARE = 0.9
"""Eviction goes on until the folder holds no more than this share of its budget: counting takes a while."""


class NodeCache:
    """Entries by name, at most ``max_bytes`` of them; names are file names.

    Args:
        folder: where it lies; None: ``tinybert-corpus-cache-UID`` in the system's folder for temporary files.
        max_bytes: most bytes of all entries, those in the making included.

    Raises: ValueError when the system's folder holds another user's under that name.
    """

    def __init__(self, folder: str | None, max_bytes: int) -> None:
        self.folder = _default_folder() if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self._warned = False
        with contextlib.suppress(OSError):  # there may be nothing yet
            self._sweep()

    def read(self, name: str, offset: int, count: int) -> bytes | None:
        """``count`` bytes of an entry from ``offset``, and mark it as used; None when it is not there."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self._warn(error)
            return None
        try:
            with contextlib.suppress(OSError):  # another's file
                os.utime(descriptor)
            return os.pread(descriptor, count, offset)
        except OSError as error:
            self._warn(error)
            return None
        finally:
            os.close(descriptor)

    def get(self, name: str, size: int, fetch: Callable[[], bytes]) -> bytes:
        """An entry of ``size`` bytes; ``fetch`` is called by one process of the node when it is not there."""
        content = self.read(name, 0, size)
        if content is None:
            with self._making(name, wait=True) as descriptor:
                content = self.read(name, 0, size)  # another may have made it while this one waited
                if content is None:
                    content = fetch()
                    if descriptor is not None:
                        self._make(name, descriptor, size, [content])
        return content

    def add(self, name: str, size: int, pieces: Callable[[], Iterable[bytes]]) -> bool:
        """Make a large entry, unless it is there, and unless the node makes one already: one at a time leaves
        bandwidth for what is needed at once. Returns whether it is there now.

        What ``pieces`` raises leaves no entry, and is passed on.
        """
        if not (self.folder / name).exists():
            with self._making("large", wait=False) as turn, self._making(name, wait=False) as descriptor:
                if turn is not None and descriptor is not None and not (self.folder / name).exists():
                    self._make(name, descriptor, size, pieces())
        return (self.folder / name).exists()

    def discard(self, name: str, reason: str) -> None:
        """Throw away an entry that is not what it should be."""
        log.warning("cache %s: %s is damaged (%s); it is fetched again", self.folder, name, reason)
        with contextlib.suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _making(self, name: str, *, wait: bool) -> Iterator[int | None]:
        """The locked ``partial/<name>``; None when the folder cannot be used, or another has it."""
        path = self.folder / "partial" / name
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = _lock(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self._warn(error)
            yield None
            return
        try:
            yield descriptor
        finally:
            with contextlib.suppress(OSError):  # where it was renamed, another's may stand there by now
                if _is_at(descriptor, path):
                    path.unlink()
            _unlock(descriptor)

    def _make(self, name: str, descriptor: int, size: int, pieces: Iterable[bytes]) -> None:
        """Fill the locked partial file and give it its name."""
        pieces = iter(pieces)
        try:
            os.truncate(descriptor, 0)
            self._take(descriptor, size)
        except OSError as error:
            self._warn(error)
            return
        offset = 0
        for piece in pieces:
            try:
                while piece:
                    written = os.pwrite(descriptor, piece, offset)
                    offset, piece = offset + written, piece[written:]
            except OSError as error:
                self._warn(error)
                return
        assert offset == size, f"{name}: {offset} bytes, not {size}"
        try:
            (self.folder / "partial" / name).rename(self.folder / name)
        except OSError as error:
            self._warn(error)

    def _take(self, descriptor: int, size: int) -> None:
        """Take space for a partial file, evicting what was used longest ago. Raises: OSError, none left."""
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes are more than the cache's max_bytes={self.max_bytes}")
        ledger = _lock(self.folder / "used", fcntl.LOCK_EX)
        try:
            text = os.pread(ledger, 20, 0)
            used = int(text) if text.isdigit() else self.max_bytes  # new, or torn: count
            if used + size > self.max_bytes:
                used = self._evict(min(int(KEPT_SHARE * self.max_bytes), self.max_bytes - size))
            # Written first: a crash in between makes the number too high, never too low.
            os.pwrite(ledger, f"{used + size:020d}".encode(), 0)
            os.posix_fallocate(descriptor, 0, size)
        finally:
            _unlock(ledger)

    def _evict(self, allowed: int) -> int:
        """Remove entries until the folder holds at most ``allowed`` bytes; what it holds then."""
        self._sweep()
        total, entries = 0, list[tuple[int, int, Path]]()
        # In this order: an entry that gets its name meanwhile is counted, if need be twice.
        for folder in (self.folder / "partial", self.folder):
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if path.is_file() and path.name != "used":
                        total += status.st_size
                        if folder == self.folder:
                            entries.append((status.st_mtime_ns, status.st_size, path))
        for _, size, path in sorted(entries):
            if total <= allowed:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _sweep(self) -> None:
        """Remove the partial files of processes that died: those that nobody has locked."""
        for path in (self.folder / "partial").iterdir():
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                descriptor = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_at(descriptor, path):
                        path.unlink()
                finally:
                    _unlock(descriptor)

    def _warn(self, error: OSError) -> None:
        warned, self._warned = self._warned, True  # before the message: other threads come here too
        if not warned:
            log.warning(
                "cache %s cannot be used (%s); reading goes on without it", self.folder, error.strerror
            )


def _default_folder() -> Path:
    """A folder of this user's own, where any user may make one. Raises: ValueError, another has made it."""
    folder = Path(tempfile.gettempdir()) / f"tinybert-corpus-cache-{os.getuid()}"
    with contextlib.suppress(OSError):  # it is there, or nothing can be made
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
        # What lies in it could be links, through which this process would write.
        raise ValueError(f"{folder} is not this user's own; remove it, or set data.cache.folder")
    return folder


def _lock(path: Path, how: int) -> int:
    """Open a file, made when it is not there, and lock it. Raises: BlockingIOError with LOCK_NB."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, how)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        _unlock(descriptor)  # it was renamed or removed while this one waited


def _unlock(descriptor: int) -> None:
    # Not by closing alone: a process that was forked meanwhile has the file open too.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that bears this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
