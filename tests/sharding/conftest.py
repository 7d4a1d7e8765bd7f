"""A small source of several files and a build of it; corpora behind servers, and how they are read."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.corpus_schema import CorpusConfig, SourceConfig, SourceKind
from sharding import store
from sharding.cache import NodeCache
from sharding.manifest import Corpus, open_corpus
from sharding.stream import Batch, stream
from tests.conftest import WORDS
from tests.sharding.servers import Proxy, nginx, s3

ROWS = 1440  # more than two epochs


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of 3 to 120 words, one a line, in 6 files."""
    random = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("text")
    for number in range(6):
        lines = [" ".join(random.choice(WORDS, size=int(random.integers(3, 120)))) for _ in range(50)]
        (folder / f"words{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def text_config(text_folder: Path, tiny_tokenizer: Path, tmp_path: Path) -> CorpusConfig:
    return CorpusConfig(
        output=str(tmp_path / "corpus"),
        source=SourceConfig(kind=SourceKind.text, path=str(text_folder), one_per_line=True),
        tokenizer=str(tiny_tokenizer),
        seq_len=32,
        block_rows=64,
        max_shard_bytes=20_480,
        min_document_chars=20,
        heldout_share=0.1,
        processes=1,
    )


@pytest.fixture(scope="session")  # a process keeps the endpoint that it has seen first
def proxies(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Proxy]]:
    """A fault-injecting proxy before a server of each kind, which holds the tiny corpus."""
    with pytest.MonkeyPatch.context() as patch:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        root = tiny_corpus.parent
        with nginx(root, tmp_path_factory.mktemp("nginx")) as http_port, s3(root, "bucket") as s3_port:
            proxies = {"http": Proxy(http_port), "s3": Proxy(s3_port)}
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxies['s3'].port}")
            yield proxies
            for proxy in proxies.values():
                proxy.shutdown()
                proxy.server_close()


@pytest.fixture(params=["http", "s3"])
def remote(request: pytest.FixtureRequest, proxies: dict[str, Proxy], quick: None) -> tuple[str, Proxy]:
    """URL of the corpus, and the proxy before it."""
    proxy = proxies[request.param]
    proxy.reset()
    return {"http": f"http://127.0.0.1:{proxy.port}/tiny", "s3": "s3://bucket/tiny"}[request.param], proxy


@pytest.fixture
def over_http(proxies: dict[str, Proxy], quick: None) -> tuple[str, Proxy]:
    """As ``remote``, by HTTP alone, where the protocol makes no difference."""
    proxies["http"].reset()
    return f"http://127.0.0.1:{proxies['http'].port}/tiny", proxies["http"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that suit a test; workers inherit them."""
    monkeypatch.setattr(store, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def log_lines(tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """What this process and its workers logged at WARNING and above."""
    path = tmp_path / "log.txt"
    handler = logging.FileHandler(path)
    logging.getLogger("sharding").addHandler(handler)
    yield lambda: path.read_text().splitlines()
    logging.getLogger("sharding").removeHandler(handler)


@pytest.fixture(scope="module")
def local(tiny_corpus: Path) -> list[Batch]:
    """The batches of the local corpus."""
    return list(read(open_corpus(tiny_corpus)))


def read(corpus: Corpus, **changes: Any) -> Iterator[Batch]:
    settings = dict(
        seed=5,
        group_blocks=3,
        start_row=0,
        stop_row=ROWS,
        global_batch_rows=48,
        rank=0,
        world_size=1,
        workers=0,
        prefetch_steps=2,
        prefetch_blocks=4,
    )
    return stream(corpus, "train", **{**settings, **changes})  # type: ignore[arg-type]


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    for left, right in zip(batches, expected, strict=True):
        assert left.position == right.position
        for name in ("ids_BS", "length_B", "segment_B"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name


def cached(folder: Path, corpus: Corpus, share: float) -> NodeCache:
    """A cache of ``share`` of the bytes of the training shards."""
    return NodeCache(str(folder), int(share * sum(shard.bytes for shard in corpus.split("train").shards)))


SINGLE_BLOCKS = 1.05  # all blocks fit, but not with room to spare: shards are not fetched whole


def block_paths(corpus: Corpus) -> list[str]:
    return [shard.path for shard in corpus.split("train").shards for _ in shard.blocks]
