"""Fixtures for all rooms: a tiny tokenizer and a tiny corpus, made here, with nothing downloaded."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sharding.manifest import FORMAT_VERSION, LeftOut, Manifest, SourceInfo, Split
from sharding.packing import Packer
from sharding.shards import write_shard
from sharding.tokens import id_dtype, load_tokenizer, tokenizer_info

SYLLABLES = ["ba", "de", "fi", "go", "ku", "la", "mi", "no", "pe", "ru", "sa", "te", "vo"]
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]


def write_tiny_tokenizer(folder: Path) -> Path:
    """A fast uncased BERT tokenizer of 232 tokens: words of two syllables, letters, punctuation."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *".,()[]",
        *letters,
        *(f"##{x}" for x in letters),
        *WORDS,
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def write_tiny_corpus(root: Path, tokenizer_folder: Path) -> Path:
    """A corpus of 32-token rows, 64 rows a block: about 640 train rows in 5 shards, 87 held-out rows."""
    tokenizer = load_tokenizer(str(tokenizer_folder), None)
    info = tokenizer_info(tokenizer, str(tokenizer_folder), None)
    random = np.random.default_rng(0)
    splits = {}
    for split, shard_documents in {"train": [96] * 5, "heldout": [60]}.items():
        (root / split).mkdir(parents=True)
        shards = []
        for number, documents in enumerate(shard_documents):
            packer = Packer(
                seq_len=32,
                block_rows=64,
                cross_documents=True,
                pad_id=info.pad_id,
                cls_id=info.cls_id,
                sep_id=info.sep_id,
                dtype=id_dtype(info.vocab_size),
            )
            blocks = []
            for _ in range(documents):
                # Each document keeps to a few words, so that there is something to learn.
                topic = random.choice(len(tokenizer) - 5, size=8, replace=False) + 5
                blocks += packer.add(random.choice(topic, size=int(random.integers(5, 75))))
            blocks += packer.finish()
            shards.append(write_shard(root, f"{split}/{number:05d}.tar", blocks))
        splits[split] = Split(
            documents=sum(shard_documents),
            rows=sum(sum(shard.rows) for shard in shards),
            tokens=sum(sum(shard.tokens) for shard in shards),
            shards=tuple(shards),
        )
    source = SourceInfo("text", ("made by tests/conftest.py",), None, None, None, 0, None)
    manifest = Manifest(
        version=FORMAT_VERSION,
        tokenizer=info,
        source=source,
        seq_len=32,
        packing="full",
        block_rows=64,
        heldout_share=0.1,
        shuffle_seed=None,
        deduplicate="none",
        near_threshold=None,
        left_out=LeftOut(0, 0, 0, 0),
        splits=splits,
    )
    (root / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return root


def heed_interrupts() -> None:
    """Before exec: take Ctrl-C again, which a shell's background jobs, and so their children, ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes, mounted at ``folder``; skips the test where that is not allowed."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()):
        pytest.skip(f"a small tmpfs cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        libc.umount2(str(folder).encode(), 2)


@pytest.fixture(scope="module", autouse=True)
def own_network() -> Iterator[None]:
    """A test that connects leaves the interface that it used in the environment: not to other modules."""
    yield
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a fast BERT tokenizer of about 230 tokens (pad 0, unk 1, cls 2, sep 3, mask 4)."""
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A corpus of 32-token rows, 64 rows a block: about 640 train rows in 5 shards, 87 held-out rows."""
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "tiny", tiny_tokenizer)
