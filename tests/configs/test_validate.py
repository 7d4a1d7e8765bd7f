"""Every rule that a config alone can break, each with what is said about it."""

import copy
import itertools

import pytest

from configs.corpus_schema import CorpusConfig, SourceConfig, SourceKind
from configs.schema import MixtureConfig, RunConfig, TeacherConfig, TrainConfig
from configs.student_schema import StudentConfig
from configs.validate import check_batch, check_corpus, check_run


def valid_run() -> RunConfig:
    config = RunConfig(
        name="run",
        output="out",
        teacher=TeacherConfig(model="big"),
        students=[
            StudentConfig(name=name, layers=2, hidden_size=8, heads=2, intermediate_size=16)
            for name in ("first", "second")
        ],
    )
    config.train.steps = 5
    config.data.corpus = "corpus"
    return copy.deepcopy(config)


def assign(config, dotted: str, value) -> None:
    *path, last = dotted.split(".")
    for key in path:
        config = config[int(key)] if isinstance(config, list) else getattr(config, key)
    setattr(config, last, value)


def run_with(**changes) -> RunConfig:
    config = valid_run()
    for dotted, value in changes.items():
        assign(config, dotted.replace("__", "."), value)
    return config


def enum(config, dotted: str, name: str):
    """Another member of the enum that a field holds."""
    for key in dotted.split("."):
        config = getattr(config, key)
    return type(config)[name]


def test_a_valid_run_has_no_problem():
    assert check_run(valid_run()) == []


RULES = [
    ("probes.every_steps", 5, "probes.every_steps=5 and probes.tasks with 0 corpora: set both, or none"),
    ("probes.tasks", ["mood"], "probes.every_steps=None and probes.tasks with 1 corpora"),
    ("probes.rows", 1, "probes.rows=1 must be at least 2"),
    ("name", "a/b", "name='a/b' must be letters, digits"),
    ("name", ".hidden", "name='.hidden' must be letters"),
    ("name", "", "name='' must be letters"),
    ("tracking.under", ["wiki", "a / b"], "tracking.under.1='a / b' must be letters, digits"),
    ("train.global_batch_rows", 0, "train.global_batch_rows=0 must be at least 1"),
    (
        "train.global_batch_rows",
        40,
        "40 is not a multiple of 32 (micro batch 32 x 1 ranks); nearest: 32, 64; or",
    ),
    ("train.micro_batch_rows", 0, "train.micro_batch_rows=0 must be at least 1"),
    ("train.steps", 0, "train.steps=0 must be at least 1"),
    ("train.steps", None, "train.epochs=None and train.steps=None: set exactly one of the two"),
    ("train.epochs", 3.0, "train.epochs=3.0 and train.steps=5: set exactly one of the two"),
    ("train.threads", 0, "train.threads=0 must be at least 1"),
    ("train.max_skipped_steps", 0, "train.max_skipped_steps=0 must be at least 1"),
    ("train.seed", -1, "train.seed=-1 must be at least 0"),
    ("data.group_blocks", 0, "data.group_blocks=0 must be at least 1"),
    ("data.workers", -1, "data.workers=-1 must be at least 0"),
    ("data.prefetch_steps", 0, "data.prefetch_steps=0 must be at least 1"),
    ("data.prefetch_blocks", -1, "data.prefetch_blocks=-1 must be at least 0"),
    ("data.cache.max_bytes", -1, "data.cache.max_bytes=-1 must be at least 0"),
    ("data.corpus", None, "data.corpus=None and data.mixture with 0 corpora: set one of the two"),
    ("data.mixture", [MixtureConfig("a")], "data.corpus=corpus and data.mixture with 1 corpora: set one of"),
    ("evaluation.every_steps", 0, "evaluation.every_steps=0 must be at least 1"),
    ("evaluation.rows", 0, "evaluation.rows=0 must be at least 1"),
    ("checkpoint.every_steps", 0, "checkpoint.every_steps=0 must be at least 1"),
    ("checkpoint.keep_last", 0, "checkpoint.keep_last=0 must be at least 1"),
    ("checkpoint.keep_every_steps", 0, "checkpoint.keep_every_steps=0 must be at least 1"),
    (
        "checkpoint.keep_every_steps",
        750,
        "keep_every_steps=750 is not a multiple of checkpoint.every_steps=500",
    ),
    ("log.every_steps", 0, "log.every_steps=0 must be at least 1"),
    (
        "teacher.offload_folder",
        "nvme",
        "teacher.offload_folder='nvme' goes with teacher.placement=offload, not",
    ),
    ("deepspeed.zero_stage", 4, "deepspeed.zero_stage=4 must be 0, 1, 2 or 3"),
    (
        "deepspeed.extra",
        {"optimizer": {}},
        "deepspeed.extra.optimizer follows from students.N.optimizer; set",
    ),
    ("students.1.name", "first", "the name 'first' is used 2 times; give each its own"),
    ("students.1.name", "a b", "students.1.name='a b' must be letters, digits"),
    ("students.1.layers", 0, "students.1.layers=0 must be at least 1"),
    ("students.1.heads", 0, "students.1.heads=0 must be at least 1"),
    ("students.1.hidden_size", 0, "students.1.hidden_size=0 must be at least 1"),
    ("students.1.hidden_size", 9, "students.1.hidden_size=9 is not a multiple of heads=2"),
    ("students.1.intermediate_size", 0, "students.1.intermediate_size=0 must be at least 1"),
    ("students.1.layer_map", 3, "students.1.layer_map=3 must be uniform, last, skip or a list"),
    ("students.1.layer_map", None, "students.1.layer_map=None must be uniform, last, skip or a list"),
    ("students.1.losses.hidden", -1.0, "students.1.losses.hidden=-1.0 must be at least 0"),
    ("students.1.losses.attention", float("nan"), "students.1.losses.attention=nan must be at least 0"),
    ("students.1.losses.layers", [1.0], "students.1.losses.layers has 1 weights for 2 layers"),
    ("students.1.losses.layers", [1.0, -1.0], "losses.layers=[1.0, -1.0] must all be at least 0"),
    ("students.1.optimizer.lr", 0.0, "students.1.optimizer.lr=0.0 must be above 0"),
    ("students.1.optimizer.lr", float("nan"), "students.1.optimizer.lr=nan must be above 0"),
    ("students.1.optimizer.betas", [0.9], "students.1.optimizer.betas=[0.9] must be two numbers"),
    (
        "students.1.optimizer.betas",
        [0.9, 1.0],
        "betas=[0.9, 1.0] must be two numbers, at least 0 and below 1",
    ),
    ("students.1.optimizer.eps", 0.0, "students.1.optimizer.eps=0.0 must be above 0"),
    ("students.1.optimizer.weight_decay", -0.1, "optimizer.weight_decay=-0.1 must be at least 0"),
    ("students.1.optimizer.max_grad_norm", 0.0, "max_grad_norm=0.0 must be above 0, or null for none"),
    ("students.1.optimizer.warmup", 1.5, "students.1.optimizer.warmup=1.5 must be between 0 and 1: it is a"),
    ("students.1.optimizer.min_lr_ratio", -0.5, "min_lr_ratio=-0.5 must be between 0 and 1"),
]


@pytest.mark.parametrize("key, value, said", RULES, ids=[f"{key}={value}" for key, value, _ in RULES])
def test_a_broken_rule_is_said_once(key, value, said):
    config = valid_run()
    assign(config, key, value)
    found = check_run(config)
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            {"quantization": "fp8", "precision": "fp32"},
            "teacher.quantization=fp8 needs teacher.precision=bf16, not fp32",
        ),
        (
            {"quantization": "int8", "placement": "zero3"},
            "teacher.quantization=int8 needs teacher.placement=replicated, not zero3",
        ),
        (
            {"compile": True, "placement": "offload"},
            "teacher.compile=true needs teacher.placement=replicated, not offload",
        ),
    ],
)
def test_what_a_teacher_cannot_be_at_a_time(settings, said):
    config = valid_run()
    for key, value in settings.items():
        assign(config, f"teacher.{key}", value if value is True else enum(config, f"teacher.{key}", value))
    (problem,) = check_run(config)
    assert problem.startswith(said)


def test_what_a_teacher_can_be_at_a_time():
    config = valid_run()
    config.teacher.compile = True
    config.teacher.quantization = enum(config, "teacher.quantization", "fp8")
    assert check_run(config) == []
    config.teacher = TeacherConfig("big", placement=enum(config, "teacher.placement", "offload"))
    config.teacher.offload_folder = "nvme"
    assert check_run(config) == []


def test_the_corpora_of_a_mixture():
    config = run_with(data__corpus=None)
    config.data.mixture = [MixtureConfig("a", weight=2.0), MixtureConfig("b", weight=1.0, name="b")]
    assert check_run(config) == []
    config.data.mixture += [MixtureConfig("c"), MixtureConfig("d", "d/e", weight=0.0)]
    first, second, third = check_run(config)
    assert "data.mixture: 3 of 4 corpora have a weight; set all of them, or none" in first
    assert "data.mixture.3.weight=0.0 must be above 0" in second
    assert "data.mixture.3.name='d/e' must be letters" in third


@pytest.mark.parametrize("epochs", [0.0, -1.0, float("nan")])
def test_epochs_are_above_zero(epochs):
    (problem,) = check_run(run_with(train__steps=None, train__epochs=epochs))
    assert problem == f"train.epochs={epochs} must be above 0"


def test_a_student_that_would_learn_nothing():
    losses = {f"students__0__losses__{name}": 0.0 for name in ("embedding", "hidden", "attention")}
    (problem,) = check_run(run_with(**losses))
    assert problem == "students.0.losses: every weight is 0, so nothing would be learned"


@pytest.mark.parametrize(
    "field, member, stages, said",
    [
        ("offload_optimizer", "cpu", {1, 2, 3}, "offload_optimizer=cpu needs deepspeed.zero_stage 1, 2 or 3"),
        ("offload_parameters", "cpu", {3}, "offload_parameters=cpu needs deepspeed.zero_stage 3, not"),
        ("precision", "bf16", {1, 2, 3}, "deepspeed.precision=bf16 needs deepspeed.zero_stage 1, 2 or 3"),
        ("precision", "fp16", {1, 2, 3}, "deepspeed.precision=fp16 needs deepspeed.zero_stage 1, 2 or 3"),
        ("precision", "fp32", {0, 1, 2, 3}, ""),
    ],
)
def test_what_needs_which_zero_stage(field, member, stages, said):
    for stage in range(4):
        config = run_with(deepspeed__zero_stage=stage)
        assign(config, f"deepspeed.{field}", enum(config, f"deepspeed.{field}", member))
        found = check_run(config)
        assert (found == []) == (stage in stages)
        assert all(said in problem for problem in found)


def test_problems_add_up_over_sections_and_students():
    config = run_with(name="a b", deepspeed__zero_stage=9, data__workers=-1)
    for student in config.students:
        student.heads, student.optimizer.lr = 3, 0.0
    keys = [problem.split("=")[0] for problem in check_run(config)]
    assert sorted(keys) == [
        "data.workers",
        "deepspeed.zero_stage",
        "name",
        *(f"students.{i}.{key}" for i in (0, 1) for key in ("hidden_size", "optimizer.lr")),
    ]


@pytest.mark.parametrize(
    "rows, micro, ranks, nearest",
    [
        (2048, 48, 8, "2048 is not a multiple of 384 (micro batch 48 x 8 ranks); nearest: 1920, 2304"),
        (100, 32, 1, "100 is not a multiple of 32 (micro batch 32 x 1 ranks); nearest: 96, 128"),
        (8, 4, 4, "8 is not a multiple of 16 (micro batch 4 x 4 ranks); nearest: 16"),  # 0 is no batch
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(rows, micro, ranks, nearest):
    train = TrainConfig(global_batch_rows=rows, micro_batch_rows=micro)
    way_out = "; or allow any number of ranks with train.elastic=true"
    assert check_batch(train, ranks) == [f"train.global_batch_rows={nearest}{way_out}"]
    train.elastic = True
    assert (check_batch(train, ranks) == []) == (rows >= ranks)


def test_elastic_ranks_all_have_rows_in_every_micro_batch():
    for rows, micro, ranks in itertools.product(range(1, 20), range(1, 8), range(1, 8)):
        fewest, most = rows // ranks, -(-rows // ranks)
        train = TrainConfig(global_batch_rows=rows, micro_batch_rows=micro, elastic=True)
        fine = fewest >= -(-most // micro)
        assert (check_batch(train, ranks) == []) == fine


def test_a_batch_is_fine_exactly_when_every_rank_gets_whole_micro_batches():
    fine = {
        (micro, ranks)
        for micro in range(1, 49)
        for ranks in range(1, 9)
        if check_batch(TrainConfig(global_batch_rows=48, micro_batch_rows=micro), ranks) == []
    }
    dealt = {
        (micro, ranks) for micro in range(1, 49) for ranks in range(1, 9) for n in range(1, 49)
        if micro * ranks * n == 48
    }  # fmt: skip
    assert fine == dealt


def valid_corpus() -> CorpusConfig:
    source = SourceConfig(kind=SourceKind.text, path="words.txt")
    return CorpusConfig(output="out", tokenizer="t", source=source)


CORPUS_RULES = [
    ("min_document_chars", -1, "min_document_chars=-1 must be at least 0"),
    ("max_documents", 0, "max_documents=0 must be at least 1"),
    ("processes", 0, "processes=0 must be at least 1"),
    ("block_rows", 0, "block_rows=0 must be at least 1"),
    ("seq_len", 7, "seq_len=7 must be between 8 and 65535"),
    ("heldout_share", 1.0, "heldout_share=1.0 must be at least 0 and below 1"),
    ("heldout_share", -0.1, "heldout_share=-0.1 must be at least 0"),
    ("heldout_share", float("nan"), "heldout_share=nan must be at least 0"),
    (
        "max_shard_bytes",
        1000,
        "max_shard_bytes=1000 cannot hold one block (1024 rows of up to 516 bytes); raise it",
    ),
    ("near_threshold", 1.0, "near_threshold=1.0 must be above 0 and below 1"),
    ("shuffle_seed", -1, "shuffle_seed=-1 must be at least 0 and below 2**64, or null"),
    ("source.subset", "20231101.en", "source.subset='20231101.en' goes with source.kind=datasets only"),
]


@pytest.mark.parametrize("key, value, said", CORPUS_RULES)
def test_a_broken_rule_of_a_corpus_is_said_once(key, value, said):
    config = valid_corpus()
    assert check_corpus(config) == []
    assign(config, key, value)
    found = check_corpus(config)
    assert len(found) == 1 and said in found[0], found


def test_rows_too_long_for_their_stored_length():
    config = valid_corpus()
    config.seq_len, config.max_shard_bytes = 65_536, 10**12
    assert check_corpus(config) == ["seq_len=65536 must be between 8 and 65535"]


@pytest.mark.parametrize("kind", SourceKind)
def test_settings_of_one_kind_of_source(kind):
    config = valid_corpus()
    config.source.kind, config.source.one_per_line, config.source.subset = kind, True, "en"
    found = " ".join(check_corpus(config))
    assert ("one_per_line" in found) == (kind is not SourceKind.text)
    assert ("subset" in found) == (kind is not SourceKind.datasets)


@pytest.mark.parametrize(
    ("saves", "evaluations", "said"),
    [
        (500, 500, None),
        (500, 1000, None),
        (500, 100, None),
        (500, 750, "neither of checkpoint.every_steps=500 and evaluation.every_steps=750 is a multiple"),
        (None, 500, "needs checkpoint.every_steps=None and evaluation.every_steps=500 to be set"),
        (500, None, "needs checkpoint.every_steps=500 and evaluation.every_steps=None to be set"),
        (0, 500, "checkpoint.every_steps=0 must be at least 1"),
    ],
)
def test_the_best_can_be_kept_where_saves_are_evaluated(saves, evaluations, said):
    config = valid_run()
    config.checkpoint.every_steps, config.evaluation.every_steps = saves, evaluations
    config.checkpoint.keep_best = True
    found = check_run(config)
    assert len(found) == (said is not None) and (said is None or said in found[0]), found


def test_only_saved_steps_can_be_kept():
    config = valid_run()
    config.checkpoint.every_steps, config.checkpoint.keep_every_steps = 250, 1000
    assert check_run(config) == []
    config.checkpoint.every_steps = None
    assert "keep_every_steps=1000 is not a multiple of checkpoint.every_steps=None" in check_run(config)[0]
