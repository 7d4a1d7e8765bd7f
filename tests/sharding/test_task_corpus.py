"""Corpora of tasks: rows as the stock tokenizer makes them, labels beside them, in any reader's hands."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from transformers import BertTokenizerFast

from configs.schema import TeacherConfig
from configs.task_schema import TaskConfig, TaskSourceConfig
from sharding.examples import Example, read_examples
from sharding.labels import read_labels
from sharding.manifest import CorpusError, open_corpus
from sharding.packing import Rows
from sharding.stream import sequential, stream
from sharding.task_corpus import build, encode, finish, split_of, write_part
from sharding.verify import verify
from tests.conftest import WORDS


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 30, (count, 2))
    return [
        (" ".join(random.choice(WORDS, a)), " ".join(random.choice(WORDS, b))) for a, b in lengths.tolist()
    ]


@pytest.fixture(scope="session")
def rte_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,500 training pairs and 70 to evaluate on, in RTE's layout; the line's number decides the class."""
    folder = tmp_path_factory.mktemp("rte")
    for name, count, seed in (("train", 2500, 1), ("dev", 70, 2)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for n, (a, b) in enumerate(pairs(count, seed)):
            lines.append(f"{n}\t{a}\t{b}\t{'not_entailment' if n % 3 else 'entailment'}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def config_of(files: Path, tokenizer: Path, output: Path) -> TaskConfig:
    return TaskConfig(
        task="rte",
        output=str(output),
        source=TaskSourceConfig(path=str(files)),
        seq_len=32,
        teacher=TeacherConfig(model=str(tokenizer)),
    )


@pytest.fixture(scope="session")
def built(rte_files: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the corpus."""
    config = config_of(rte_files, tiny_tokenizer, tmp_path_factory.mktemp("task"))
    build(config)
    return Path(config.output) / "data"


def test_rows_are_those_of_the_stock_tokenizer(tiny_tokenizer: Path) -> None:
    tokenizer = BertTokenizerFast.from_pretrained(tiny_tokenizer)
    texts = [*pairs(200, 0), ("", WORDS[0]), (WORDS[0], ""), (" ".join(WORDS[:40]), " ".join(WORDS[:40]))]
    for b_too in (True, False):
        examples = [
            Example(str(n), a, b if b_too else None, n % 2) for n, (a, b) in enumerate(texts) if a or b_too
        ]
        for seq_len in (16, 17, 32):
            rows, labels = encode(examples, tokenizer, seq_len)
            stock = tokenizer(
                [example.a for example in examples],
                [example.b for example in examples] if b_too else None,
                truncation="longest_first",
                max_length=seq_len,
                padding="max_length",
                return_tensors="np",
            )
            assert np.array_equal(rows.ids, stock["input_ids"]) and rows.ids.dtype == np.uint16
            assert np.array_equal(rows.lengths, stock["attention_mask"].sum(axis=1))
            assert np.array_equal(rows.lengths - rows.segments, stock["token_type_ids"].sum(axis=1))
            assert np.array_equal(labels[:, 0], [example.label for example in examples])
            assert labels.dtype == np.float32


def test_text_that_spells_a_special_token_is_text(tiny_tokenizer: Path) -> None:
    tokenizer = BertTokenizerFast.from_pretrained(tiny_tokenizer)
    rows, _ = encode([Example("0", "a [SEP] b [PAD] [CLS]", None, 0.0)], tokenizer, 32)
    content = rows.ids[0, 1 : rows.lengths[0] - 1]
    assert not np.isin(
        content, [tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.cls_token_id]
    ).any()


def test_a_built_corpus_is_sound_and_says_what_it_is(built: Path, tiny_tokenizer: Path) -> None:
    corpus = open_corpus(built)
    assert verify(corpus) == []
    manifest = corpus.manifest
    assert manifest.task is not None and manifest.task.labels == ("entailment", "not_entailment")
    assert {name: (split.documents, split.rows) for name, split in manifest.splits.items()} == {
        "train": (2500, 2500),
        "heldout": (70, 70),
    }
    assert (manifest.packing, manifest.source.kind, manifest.source.names) == (
        "document",
        "files",
        ("train.tsv", "dev.tsv"),
    )
    assert [path for path in built.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(CorpusError, match="has no split 'test', only heldout, train; a task's splits are"):
        corpus.split("test")


def test_the_same_bytes_again_in_place_of_the_old(
    built: Path, rte_files: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    config = config_of(rte_files, tiny_tokenizer, tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "old").touch()
    build(config)
    files = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    other = tmp_path / "data"
    assert {path.relative_to(other) for path in other.rglob("*") if path.is_file()} == files
    assert all((built / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_a_failed_build_leaves_what_was_there(
    built: Path, rte_files: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    shutil.copytree(built, tmp_path / "data")
    bad = shutil.copytree(rte_files, tmp_path / "files")
    (bad / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n")
    with pytest.raises(CorpusError, match=r"dev.tsv:2: label is 'maybe'"):
        build(config_of(bad, tiny_tokenizer, tmp_path))
    assert verify(open_corpus(tmp_path / "data")) == []
    config = config_of(rte_files, tiny_tokenizer, tmp_path)
    config.corpus = str(built)
    with pytest.raises(CorpusError, match="corpus=.* names a corpus that is there"):
        build(config)


def test_labels_in_stored_order(built: Path, tiny_corpus: Path) -> None:
    corpus = open_corpus(built)
    assert len(corpus.split("train").block_rows) == 3
    expected = (np.arange(2500) % 3 != 0).astype(np.float32)[:, None]
    assert np.array_equal(read_labels(corpus, "train"), expected)
    assert read_labels(corpus, "heldout").shape == (70, 1)
    with pytest.raises(CorpusError, match="has no labels"):
        read_labels(open_corpus(tiny_corpus), "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_know_their_rows(built: Path, rte_files: Path, tiny_tokenizer: Path, workers: int) -> None:
    corpus = open_corpus(built)
    config = config_of(rte_files, tiny_tokenizer, built.parent)
    rows, _ = encode(
        read_examples(config, "train"), BertTokenizerFast.from_pretrained(tiny_tokenizer), seq_len=32
    )
    seen = []
    for rank in range(2):
        batches = stream(
            corpus,
            "train",
            seed=3,
            group_blocks=2,
            start_row=0,
            stop_row=2500,
            global_batch_rows=100,
            rank=rank,
            world_size=2,
            workers=workers,
            prefetch_steps=2,
        )
        for batch in batches:
            assert np.array_equal(batch.ids_BS, rows.ids[batch.row_B])
            seen += batch.row_B.tolist()
    assert sorted(seen) == list(range(2500)) and seen != sorted(seen)
    stored = [
        row
        for batch in sequential(corpus, "train", rows=2500, batch_rows=700, rank=0, world_size=1)
        for row in batch.row_B.tolist()
    ]
    assert stored == list(range(2500))


def test_webdataset_and_tarfile_read_the_labels(built: Path) -> None:
    corpus = open_corpus(built)
    (shard,) = corpus.split("train").shards
    samples = list(webdataset.WebDataset([str(built / shard.path)], shardshuffle=False).decode())
    labels = np.concatenate([sample["lab.npy"] for sample in samples])
    assert np.array_equal(labels, read_labels(corpus, "train"))
    with tarfile.open(built / shard.path) as tar:
        assert [name.split(".")[1] for name in tar.getnames()] == ["ids", "len", "seg", "lab"] * 3
        member = tar.extractfile("00000-0001.lab.npy")
        assert member is not None
        assert np.array_equal(np.load(io.BytesIO(member.read())), labels[1024:2048])


def test_verify_finds_a_changed_label(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    corpus = open_corpus(copy)
    (shard,) = corpus.split("train").shards
    label = shard.block(1).lab
    assert label is not None
    content = bytearray((copy / shard.path).read_bytes())
    content[label.offset + label.bytes - 1] ^= 64
    (copy / shard.path).chmod(0o644)
    (copy / shard.path).write_bytes(content)
    assert "00000-0001.lab.npy" in "\n".join(verify(corpus))
    with pytest.raises(CorpusError, match="corrupt shard .*00000-0001.lab.npy"):
        read_labels(corpus, "train")
    # Rows are read without labels: the stream does not meet the damage.
    assert len(list(sequential(corpus, "train", rows=2500, batch_rows=500, rank=0, world_size=1))) == 5


def test_verify_finds_labels_that_mean_nothing(built: Path, tmp_path: Path) -> None:
    manifest = open_corpus(built).manifest
    rows = Rows(*(np.array(column) for column in ([[2, 9, 3] + [0] * 29], [3], [3])))
    rows = Rows(rows.ids.astype(np.uint16), rows.lengths.astype(np.uint16), rows.segments.astype(np.uint16))
    for number, (label, told) in enumerate({1.0: 0, 2.0: 1, 0.5: 1, float("nan"): 1}.items()):
        root, output = tmp_path / f"root{number}", tmp_path / f"corpus{number}"
        shards = [
            write_part(root, f"{name}/00000.tar", rows, np.array([[label]], np.float32))
            for name in ("train", "heldout")
        ]
        splits = {shard.path.split("/")[0]: split_of([shard], 1) for shard in shards}
        changed = type(manifest)(**{**vars(manifest), "splits": splits})
        assert finish(root, output, changed) == changed and not root.exists()
        problems = verify(open_corpus(output))
        assert len(problems) == 2 * told, problems
        assert all("1 rows have labels that are none of classification" in problem for problem in problems)
