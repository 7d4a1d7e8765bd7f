"""Nothing that others made is executed: no pickles, no code from configs, corpora, models or data sets."""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import BertConfig, BertModel

from configs.corpus_schema import SourceConfig, SourceKind
from configs.load import ConfigError, load_config
from configs.schema import CheckpointConfig, RunConfig, TeacherConfig
from sharding.blocks import parse_block
from sharding.manifest import Corpus, CorpusError, open_corpus
from sharding.sources import documents, parts
from sharding.store import Store
from tests.test_architecture import SOURCES, parse
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint, EngineState, Progress
from trainer.encoders import load_encoder, load_teacher_config, load_tokenizer

FORBIDDEN_IMPORTS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    *("torch.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load", "importlib.import_module"),
    *("os.system", "os.popen", "tempfile.mktemp"),
    *("extract", "extractall", "unpack_archive"),  # members of archives never become paths
}
FORBIDDEN_ARGUMENTS = [("shell", "True"), ("weights_only", "False"), ("allow_pickle", "True")]
OBJECT_COLLECTIVES = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}
AMONG_RANKS = {"trainer/world.py"}  # may use them: the ranks of one job trust each other


def risks(path: str, tree: ast.Module) -> Iterator[str]:
    """What could execute something that it reads: imports and calls, by name."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.split(".")[-1]
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in FORBIDDEN_NAMES | FORBIDDEN_METHODS or last in FORBIDDEN_METHODS:
            yield called
        if called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            yield called
        if last == "from_pretrained" and keywords.get("trust_remote_code") != "False":
            yield called
        if last in OBJECT_COLLECTIVES and path not in AMONG_RANKS:
            yield called
        yield from (
            f"{called}({key}={value})" for key, value in FORBIDDEN_ARGUMENTS if keywords.get(key) == value
        )


@pytest.mark.parametrize("path", SOURCES)
def test_no_source_calls_what_could_execute_its_input(path: str) -> None:
    assert list(risks(path, parse(path))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "tar.extractall(folder)",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "dist.all_gather_object(found, value)",
        "importlib.import_module(name)",
    ],
)
def test_the_rule_finds_what_it_forbids(line: str) -> None:
    assert list(risks("trainer/any.py", ast.parse(line)))


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def payload(tmp_path: Path) -> Iterator[Payload]:
    """What is hidden in files here; at the end it must not have gone off."""
    made = Payload(tmp_path / "gone-off")
    pickle.loads(pickle.dumps(made))
    made.target.rmdir()  # it works
    yield made
    assert not made.target.exists(), "something was executed"


CODE = "import os\nos.mkdir({target!r})\n"


# Models


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A saved BERT, its tokenizer beside it."""
    folder = tmp_path / "teacher"
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=16, max_position_embeddings=8, **shape)).save_pretrained(folder)
    return folder


def changed(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("pytorch_model.bin", "must be a model.safetensors"),
        ("an index", "Weights only load failed"),  # an index of safetensors that lists another file
        ("transformers_weights", "Weights only load failed"),
    ],
)
def test_a_teacher_in_a_pickle_is_refused(teacher: Path, payload: Payload, way: str, told: str) -> None:
    (teacher / "model.safetensors").unlink()
    name = "adapter_model.bin" if way == "transformers_weights" else "pytorch_model.bin"
    torch.save({"embeddings.word_embeddings.weight": payload}, teacher / name)
    if way == "an index":
        index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": name}}
        (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    elif way == "transformers_weights":
        changed(teacher / "config.json", transformers_weights=name)
    with pytest.raises((ValueError, pickle.UnpicklingError), match=told):
        load_encoder(str(teacher))


@pytest.mark.parametrize("kind", ["bert", "own"])
def test_code_that_a_teacher_brings_is_not_run(teacher: Path, payload: Payload, kind: str) -> None:
    (teacher / "own.py").write_text(CODE.format(target=str(payload.target)))
    classes = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": ["own.T", "own.T"]}
    changed(teacher / "config.json", auto_map=classes, model_type=kind)
    tokenizer = {"auto_map": classes, "tokenizer_class": "T"}
    (teacher / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = TeacherConfig(model=str(teacher))
    with pytest.raises(ValueError):
        load_tokenizer(config)
    if kind == "bert":  # known here, so that the weights are read by code of ours
        load_teacher_config(config)
        assert type(load_encoder(str(teacher))) is BertModel
    else:
        with pytest.raises(ValueError, match="teacher.model=.* cannot be read"):
            load_teacher_config(config)


# Checkpoints


def test_a_checkpoint_in_a_pickle_is_refused(tmp_path: Path, payload: Payload) -> None:
    state = EngineState({"a": torch.ones(2)}, {"exp_avg.a": torch.ones(2)}, 1, {})
    whole = Checkpoint(Progress(step=1), {"s": state}, {"s": 0}, "f", {}, {}, "r", 1)
    path = checkpoints.save(tmp_path / "checkpoints", whole, CheckpointConfig())
    torch.save(payload, path / "s/weights.safetensors")
    content = (path / "s/weights.safetensors").read_bytes()
    sealed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    changed(path / "files.json", **{"s/weights.safetensors": sealed})
    assert checkpoints.verify(path) == []
    with pytest.raises((ValueError, SafetensorError)):
        checkpoints.load(path)


# Configs


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.mkdir ["{target}"]',
        "!!python/module:hostile",
        "${{oc.coerce:hostile.X,1}}",
        "${{package:hostile.part}}",
        "${{oc.create:{{_target_:os.mkdir,path:{target}}}}}",
        "${{oc.decode:'${{package:hostile.part}}'}}",
        "{{_target_: os.mkdir, _args_: ['{target}']}}",
    ],
)
@pytest.mark.parametrize("place", ["file", "command line"])
def test_a_config_executes_nothing(
    tmp_path: Path, payload: Payload, monkeypatch: pytest.MonkeyPatch, value: str, place: str
) -> None:
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile/__init__.py").write_text(CODE.format(target=str(payload.target)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile", raising=False)
    text = value.format(target=payload.target)
    (tmp_path / "config.yaml").write_text(f"name: {text}\n" if text[0] != "$" else f'name: "{text}"\n')
    with pytest.raises(ConfigError):
        if place == "file":
            load_config(RunConfig, tmp_path / "config.yaml")
        else:
            load_config(RunConfig, None, [f"name={text}"])


# Corpora


def hostile_corpus(corpus: Path, **fields: str) -> Path:
    """Change the first training shard's entry in a manifest, whose fingerprint is made right again."""
    manifest = open_corpus(corpus).manifest
    train = manifest.splits["train"]
    shards = (replace(train.shards[0], **fields), *train.shards[1:])
    splits = {**manifest.splits, "train": replace(train, shards=shards)}
    (corpus / "manifest.json").write_text(replace(manifest, splits=splits).to_json())
    return corpus


@pytest.fixture
def copied_corpus(tmp_path: Path, tiny_corpus: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus, tmp_path / "corpus"))


@pytest.mark.parametrize("where", ["path", "sha256"])
@pytest.mark.parametrize("leads", ["../../x.tar", "/etc/passwd", "train/../../0.tar", "train/00000.tar\n"])
def test_a_manifest_leads_nowhere_else(copied_corpus: Path, where: str, leads: str) -> None:
    hostile_corpus(copied_corpus, **{where: leads})
    with pytest.raises(CorpusError, match=f"a shard with {where}=.*, which no build writes"):
        open_corpus(copied_corpus)


def test_a_pickle_in_a_shard_is_refused(copied_corpus: Path, payload: Payload) -> None:
    corpus: Corpus = open_corpus(copied_corpus)
    shard, block = corpus.split("train").block(0)
    buffer = io.BytesIO()
    np.save(buffer, np.array([payload], dtype=object), allow_pickle=True)
    data = buffer.getvalue()
    hidden = block.ids._replace(bytes=len(data), crc32=zlib.crc32(data))
    with pytest.raises(ValueError, match="OBJECT"):
        parse_block(Store(str(copied_corpus)), shard, block._replace(ids=hidden), data)


def write_hostile_tar(path: Path, target: Path) -> None:
    """Members that a careless extraction would write elsewhere, each a sample of its own."""
    with tarfile.open(path, "w") as tar:
        for name in ("../escaped.txt", "../../escaped.txt", f"{target}.txt", "a/../../../escaped.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))


@pytest.mark.parametrize("kind", ["files", "symlink", "hardlink", "device", "fifo"])
def test_members_of_a_foreign_tar_become_no_files(
    tmp_path: Path, payload: Payload, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "a/b/c"
    folder.mkdir(parents=True)
    path = folder / "foreign.tar"
    write_hostile_tar(path, payload.target)
    types = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    if kind != "files":
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo("link.txt")
            info.type, info.linkname = types[kind], "/etc/passwd"
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(folder)
    source = SourceConfig(kind=SourceKind.webdataset, path=str(path))

    def texts() -> list[str]:
        return [document.text for part in parts(source) for document in documents(source, part)]

    if kind == "files":
        assert texts() == ["text"] * 4
    else:
        with pytest.raises(CorpusError, match="'link.txt' is no ordinary file"):
            texts()
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path(f"{payload.target}.txt").exists()


def test_the_script_of_a_data_set_is_not_run(
    tmp_path: Path, payload: Payload, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(CODE.format(target=str(payload.target)))
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    source = SourceConfig(kind=SourceKind.datasets, path=str(folder))
    with pytest.raises(CorpusError, match="no longer supported"):
        parts(source)


DUMP = """{doctype}<mediawiki><siteinfo><sitename>W</sitename><dbname>w</dbname><base>b</base>
<generator>g</generator><case>c</case><namespaces><namespace key="0" case="c" /></namespaces></siteinfo>
<page><title>t</title><ns>0</ns><id>1</id><revision><id>1</id><text>{text}</text></revision></page></mediawiki>"""


def test_entities_of_a_dump_read_no_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("swordfish")
    path = tmp_path / "dump.xml"
    source = SourceConfig(kind=SourceKind.mediawiki, path=str(path))

    def texts(doctype: str, text: str) -> list[str]:
        path.write_text(DUMP.format(doctype=doctype, text=text))
        return [document.text for part in parts(source) for document in documents(source, part)]

    assert texts('<!DOCTYPE x [<!ENTITY e "harmless">]>', "a &e; one") == ["a harmless one"]
    with pytest.raises(CorpusError, match="undefined entity &e;"):
        texts(f'<!DOCTYPE x [<!ENTITY e SYSTEM "file://{tmp_path}/secret">]>', "a &e; one")
