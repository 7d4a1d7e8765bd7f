"""Where a corpus lies: reading parts of files, and what is said when they are not there."""

import pickle
import sys
from pathlib import Path

import pytest

from sharding.store import Store, StoreError, Unreachable, _reason
from tests.sharding.servers import free_port


def test_reads_parts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    store = Store(str(tmp_path))
    assert (store.read("a"), store.read("a", 7), store.read("a", 2, 3)) == (b"0123456789", b"789", b"234")
    assert store.read("a", 8, 10) == b"89"
    assert store.sizes(["a", "b"]) == [10, None]


def test_names_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{tmp_path}/no/such: No such file"):
        Store(str(tmp_path)).read("no/such")


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    store = Store(f"file://{tmp_path}")
    assert store.is_local and store.name == tmp_path.name
    assert store.read("a", 2, 3) == b"234" and store.sizes(["a", "b"]) == [10, None]


def test_urls_are_remote_and_nothing_is_opened_before_it_is_read() -> None:
    for url in ("s3://bucket/books", "gs://bucket/books/", "https://host/path/books"):
        store = pickle.loads(pickle.dumps(Store(url)))
        assert not store.is_local and store.name == "books"


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://user:hunter2@host/corpus", "https://host/corpus"),
        ("https://hunter2@host:8080/corpus", "https://host:8080/corpus"),
        ("https://host/corpus?X-Amz-Signature=hunter2", "https://host/corpus"),
        ("s3://key:hunter2@bucket/corpus", "s3://bucket/corpus"),
    ],
)
def test_secrets_in_urls_are_refused_and_not_repeated(url: str, safe: str) -> None:
    with pytest.raises(StoreError, match="holds no user, password, query or fragment") as error:
        Store(url)
    assert safe in str(error.value) and "hunter2" not in str(error.value)


def test_a_protocol_that_nobody_knows_and_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="nosuch://x: Protocol not known"):
        Store("nosuch://x").read("a")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StoreError, match=r"pip install tinybert-at-scale\[gs\]"):
        Store("gs://missing/package").read("a")


def test_a_signature_in_an_error_is_not_repeated() -> None:
    signed = ValueError("400, url='https://user:hunter2@host/a?X-Amz-Signature=hunter2&x=1'")
    assert "hunter2" not in _reason(signed) and "https://host/a" in _reason(signed)


def test_an_unreachable_server_ends_after_the_patience(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sharding.store.PATIENCE_S", 0.2)
    monkeypatch.setattr("sharding.store.FIRST_WAIT_S", 0.05)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(Unreachable, match="no whole answer for .* at last: ClientConnectorError"):
        Store(f"http://127.0.0.1:{free_port()}/corpus").read("manifest.json")
    assert "attempt 1: ClientConnectorError" in caplog.text and "attempt 2: " in caplog.text
