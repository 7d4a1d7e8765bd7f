"""A small source of several files, and a build of it."""

from pathlib import Path

import numpy as np
import pytest

from configs.corpus_schema import CorpusConfig, SourceConfig, SourceKind
from tests.conftest import WORDS


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
