"""What is to be delivered, kept on disk: an append-only journal of JSON lines, in segments under a folder.

One process writes, a thread of rank 0. One delivers at a time, under a lock: the same process, or
``launcher/track.py sync``. They share nothing but files, and whole lines: a line that a crash cut off is
dropped. The folder may lie on NFS or Lustre, where SQLite must not.

    00000007.jsonl  lines; the first, a header, says what the segments before it amount to
    cursor.json     how far delivery got, and what it learnt (ids); replaced atomically
    .lock           of who delivers

Delivery has two lanes, so that files, which go to a store of their own, never hold up what is small.
A segment that is delivered whole goes; of one that only files are left of, all else goes. The newest stays,
since it tells a job that starts again which steps are logged.

An entry is a mapping with ``kind`` and ``run``, a name within the journal. Of the kind ``metrics`` the
journal keeps, by run and key, the highest step, and drops what is at or before it: a resumed job that trains
some steps again does not log them twice. An entry of the kind ``again`` takes that back, to its ``step``:
after a rollback a student's steps are other steps.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sharding.files import lock_holder, try_lock, write_text

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 4 << 20
MAX_BYTES = 1 << 30  # beyond it, metrics are given up

Entry = dict[str, Any]
MAIN, FILES = "main", "files"  # lanes


class Position(NamedTuple):
    """A place between two lines."""

    segment: int
    offset: int  # bytes


START = Position(0, 0)


def lane_of(entry: Entry) -> str:
    """Return the lane in which an entry is delivered."""
    return FILES if entry["kind"] in ("text", "artifacts") else MAIN


class Journal:
    """One folder's journal: ``append`` for the writer, ``lock``, ``read`` and ``advance`` for delivery."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, and read what the jobs before left; nothing is written yet."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.positions = {MAIN: START, FILES: START}
        self.state: dict[str, Any] = {}  # what delivery learnt, kept with its positions
        self._lock: int | None = None
        self._load_cursor()
        self._steps: dict[str, dict[str, int]] = {}  # highest step by run and metric
        self._counts: dict[str, dict[str, int]] = {}  # the same of metrics that the journal itself counts
        self._keys: dict[str, str] = {}  # by run: a made-up key by which it is found in the store
        self._pending: list[Entry] = []  # not looked at yet
        self._unwritten: list[str] = []  # lines that the disk has not taken
        self._torn = False  # the last write failed, perhaps in the middle of a line
        self._file: int | None = None
        self._bytes = self._older_bytes = 0  # of the newest segment, of all before
        self._full = False
        segments = self._segments()
        self._segment = segments[-1] if segments else 0
        self._restore(segments)

    # The writer

    def append(self, entries: Iterable[Entry]) -> None:
        """Take entries and write them; what an error kept from the disk is written first by the next call.

        Raises:
            OSError: the disk did not take them.
        """
        self._pending += entries
        if self._full:  # delivery may have made room
            self._older_bytes = self._measured()
        if self._pending and not self._unwritten and (self._file is None or self._bytes >= SEGMENT_BYTES):
            self._begin_segment()
        self._unwritten += [json.dumps(own) for entry in self._pending if (own := self._first_time(entry))]
        self._pending = []
        if self._unwritten:
            self._write(("\n" if self._torn else "") + "\n".join(self._unwritten) + "\n")
            self._unwritten = []

    @property
    def unwritten(self) -> int:
        """How many entries were taken that the disk does not hold yet."""
        return len(self._pending) + len(self._unwritten)

    def close(self) -> None:
        """Close the newest segment; a later ``append`` begins another."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # all of it is on disk, or was said not to be
                os.close(file)

    def _begin_segment(self) -> None:
        number = self._segment + 1
        file = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.close()
        self._file, self._segment = file, number
        self._bytes, self._torn = 0, False
        header = {"kind": "header", "steps": self._steps, "counts": self._counts, "keys": self._keys}
        self._unwritten = [json.dumps(header)]
        self._older_bytes = self._measured()

    def _measured(self) -> int:
        """Bytes of all segments but the newest."""
        total = 0
        for number in self._segments():
            with suppress(FileNotFoundError):  # delivered meanwhile
                total += self._path(number).stat().st_size if number < self._segment else 0
        return total

    def _write(self, text: str) -> None:
        assert self._file is not None
        data = text.encode()
        self._torn = True
        written = 0
        while written < len(data):
            written += os.write(self._file, data[written:])
        os.fsync(self._file)
        self._torn = False
        self._bytes += len(data)

    def _first_time(self, entry: Entry) -> Entry | None:
        """The entry as it is to be written, None if all of it was logged before."""
        if entry["kind"] == "open":
            entry = {**entry, "key": self._keys.get(entry["run"]) or uuid.uuid4().hex}
        if entry["kind"] == "metrics":
            known = self._steps.get(entry["run"], {})
            if entry["step"] is None:  # of a count that goes on, whoever samples
                known = self._counts.get(entry["run"], {})
                step = 1 + max(known.get(key, -1) for key in entry["values"])
                entry = {**entry, "step": step, "counted": True}
            step = entry["step"]
            values = {key: own for key, own in entry["values"].items() if known.get(key, step - 1) < step}
            if not values or self._gives_up():
                return None
            entry = {**entry, "values": values}
        self._note(entry)
        return entry

    def _gives_up(self) -> bool:
        full = self._older_bytes + self._bytes >= MAX_BYTES
        if full and not self._full:
            logger.warning(
                "%s holds %d MiB that are not delivered; metrics are given up until there is room",
                self.folder,
                MAX_BYTES >> 20,
            )
        self._full = full
        return full

    def _note(self, entry: Entry) -> None:
        """Take an entry that is written into account."""
        run = entry.get("run", "")
        if entry["kind"] == "header":
            self._steps, self._keys = entry["steps"], entry["keys"]
            self._counts = entry.get("counts", {})
        elif entry["kind"] == "open":
            self._keys[run] = entry["key"]
        elif entry["kind"] == "metrics":
            noted = self._counts if entry.get("counted") else self._steps
            noted.setdefault(run, {}).update(dict.fromkeys(entry["values"], entry["step"]))
        elif entry["kind"] == "again":
            own = self._steps.get(run, {})
            self._steps[run] = {key: min(step, entry["step"]) for key, step in own.items()}

    def _restore(self, segments: list[int]) -> None:
        for number in reversed(segments):  # a crash may have left the newest without its header
            entries = [entry for entry, _ in self._lines(number, 0)]
            if entries:
                for entry in entries:
                    self._note(entry)
                return

    # Delivery

    def lock(self) -> bool:
        """Take the lock of delivery, and with it the cursor as it is now; False if another process has it."""
        if self._lock is None:
            self._lock = try_lock(self.folder / ".lock")
            if self._lock is not None:
                self._load_cursor()
        return self._lock is not None

    def unlock(self) -> None:
        """Let another process deliver."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def holder(self) -> str:
        """Return which process delivers, or did last."""
        return lock_holder(self.folder / ".lock")

    def read(self, lane: str, limit: int) -> list[tuple[Entry, Position]]:
        """Return up to ``limit`` entries that a lane has not passed, each with the position behind it.

        Those of the other lane are among them.
        """
        start = self.positions[lane]
        found: list[tuple[Entry, Position]] = []
        for number in self._segments():
            if number >= start.segment:
                for line in self._lines(number, start.offset if number == start.segment else 0):
                    found.append(line)
                    if len(found) == limit:
                        return found
        return found

    def advance(self, lane: str, position: Position) -> None:
        """Let a lane go on from there. Segments that all lanes have passed go; of those that files alone
        still wait for, the files stay."""
        before, self.positions[lane] = self.positions[lane], position
        if not self.save():
            return
        passed = min(own.segment for own in self.positions.values())
        for number in self._segments():
            if number < passed:
                self._path(number).unlink(missing_ok=True)
            elif lane == MAIN and passed < number and before.segment <= number < position.segment:
                self._keep_files(number)

    def _keep_files(self, number: int) -> None:
        """Take from a segment, which no lane is in, all that is not for the lane of files."""
        kept = [json.dumps(entry) + "\n" for entry, _ in self._lines(number, 0) if lane_of(entry) == FILES]
        with suppress(OSError):  # it costs room
            write_text(self._path(number), "".join(kept))

    def remove(self) -> None:
        """Take the folder away, with all that it holds; nobody writes or delivers any more."""
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            logger.warning("%s is delivered, but could not be removed: %s", self.folder, error)

    def save(self) -> bool:
        """Write the cursor, and return whether the disk took it; without, things are delivered again."""
        cursor = {"positions": self.positions, "state": self.state}
        try:
            write_text(self.folder / "cursor.json", json.dumps(cursor, indent=1) + "\n")
        except OSError as error:
            logger.warning("%s could not be kept: %s", self.folder / "cursor.json", error)
            return False
        return True

    def left(self) -> list[Entry]:
        """Return the entries that are not delivered, in order."""
        return [
            entry
            for number in self._segments()
            for entry, position in self._lines(number, 0)
            if entry["kind"] not in ("header", "again") and position > self.positions[lane_of(entry)]
        ]

    def _load_cursor(self) -> None:
        try:
            cursor = json.loads((self.folder / "cursor.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        self.positions = {lane: Position(*own) for lane, own in cursor["positions"].items()}
        self.state = cursor["state"]

    def _lines(self, number: int, offset: int) -> Iterator[tuple[Entry, Position]]:
        """Entries of a segment from there on, each with the position behind it."""
        try:
            with self._path(number).open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):  # torn, or on its way
                        return
                    offset += len(line)
                    try:
                        entry = json.loads(line)
                    except ValueError:  # torn, and the disk took more later; or the empty end of such a line
                        continue
                    yield entry, Position(number, offset)
        except FileNotFoundError:  # delivered meanwhile
            return

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"

    def _segments(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.jsonl"))
