"""Where a corpus lies: reading parts of files, and what is said when they are not there."""

from pathlib import Path

import pytest

from sharding.store import Store, StoreError


def test_reads_parts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    store = Store(str(tmp_path))
    assert (store.read("a"), store.read("a", 7), store.read("a", 2, 3)) == (b"0123456789", b"789", b"234")
    assert store.read("a", 8, 10) == b"89"
    assert store.sizes(["a", "b"]) == [10, None]


def test_names_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{tmp_path}/no/such: No such file"):
        Store(str(tmp_path)).read("no/such")
