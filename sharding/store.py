"""Where the files of a corpus lie."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class StoreError(OSError):
    """A file of a store that cannot be read, for a reason that trying again does not mend."""


@dataclass(frozen=True)
class Store:
    """A folder of files. Paths are relative to it, with forward slashes."""

    location: str
    """The folder as it was given; safe to print."""

    @property
    def name(self) -> str:
        """The last part of the location."""
        return Path(self.location).resolve().name

    @property
    def is_local(self) -> bool:
        """Whether reading is cheap, so that nothing need be cached."""
        return True

    def read(self, path: str, offset: int = 0, count: int | None = None) -> bytes:
        """``count`` bytes of a file from ``offset`` (all that follow, when None); fewer at its end.

        Raises: StoreError (an OSError) naming the file.
        """
        full = os.path.join(self.location, path)
        try:
            descriptor = os.open(full, os.O_RDONLY)
            try:
                wanted = os.fstat(descriptor).st_size - offset if count is None else count
                return os.pread(descriptor, wanted, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreError(error.errno, f"{full}: {error.strerror}") from error

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Size of each file in bytes; None for one that is not there."""
        found: list[int | None] = []
        for path in paths:
            try:
                found.append(os.stat(os.path.join(self.location, path)).st_size)
            except OSError:
                found.append(None)
        return found
