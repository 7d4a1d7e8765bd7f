"""Shapes of students, against what transformers builds of them."""

import pytest
import torch

from tests.trainer.tiny import (
    ARCHITECTURES,
    HEADS,
    INNER,
    LAYERS,
    NO_SPECIAL_TOKENS,
    WIDTH,
    tiny_config,
    tiny_encoder,
    tiny_student,
)
from trainer.shapes import check_students, student_hf_config, transfer

SAME_SIZE = {"layers": LAYERS, "hidden_size": WIDTH, "heads": HEADS, "intermediate_size": INNER}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def test_settings_of_the_teachers_depth_are_not_inherited():
    teacher = tiny_config("modernbert")
    assert len(teacher.layer_types) == LAYERS
    config = student_hf_config(tiny_student(layers=3), teacher)
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config.local_attention == 8  # of the architecture, not of the depth


def test_settings_of_the_same_architecture_are_inherited_and_overridden():
    teacher = tiny_config("bert", hidden_act="relu", layer_norm_eps=1e-5, hidden_dropout_prob=0.3)
    config = student_hf_config(tiny_student(overrides={"hidden_dropout_prob": 0.0}), teacher)
    assert (config.hidden_act, config.layer_norm_eps, config.hidden_dropout_prob) == ("relu", 1e-5, 0.0)
    other = student_hf_config(tiny_student(architecture="electra"), teacher)
    assert (other.hidden_act, other.layer_norm_eps, other.embedding_size) == ("gelu", 1e-12, 24)


def test_a_student_of_another_architecture_keeps_only_the_teachers_special_tokens(caplog):
    config = student_hf_config(tiny_student(architecture="modernbert"), tiny_config("bert"))
    assert {key: getattr(config, key) for key in NO_SPECIAL_TOKENS} == NO_SPECIAL_TOKENS
    assert config.pad_token_id == 0
    assert (
        student_hf_config(tiny_student(architecture="bert"), tiny_config("modernbert", pad_token_id=7))
    ).pad_token_id == 7


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            {"init": "teacher"},
            "init='teacher' needs an encoder of the same shape, but: hidden_size 24 against 48, "
            "num_attention_heads 2 against 4, intermediate_size 40 against 96; change the student's sizes",
        ),
        (
            {**SAME_SIZE, "layers": 2, "init": "teacher", "architecture": "roberta"},
            "model_type roberta against bert",
        ),
        (
            {**SAME_SIZE, "init": "teacher", "overrides": {"max_position_embeddings": 72}},
            "but: max_position_embeddings 72 against 64",
        ),
        ({"init": "/no/such/folder"}, "init='/no/such/folder' cannot be read as the folder or hub name"),
        ({"architecture": "brt"}, "architecture='brt' is not one that transformers knows"),
        ({"overrides": {"dropout_prob": 0}}, "overrides ['dropout_prob'] are not settings of a bert config"),
        ({"overrides": {"num_hidden_layers": 3}}, "overrides ['num_hidden_layers'] follow from layers"),
        (
            {"architecture": "distilbert", "overrides": {"dim": 8}},
            "overrides ['dim'] follow from layers, hidden_size",
        ),
        ({"overrides": {"hidden_dropout_prob": "lots"}}, "overrides do not make a bert config"),
        ({"overrides": {"vocab_size": 100}}, "vocab_size 100 is below the teacher's 232"),
        (
            {"overrides": {"max_position_embeddings": 31}},
            "the corpus has rows of 32 tokens, the student takes 31",
        ),
        ({"layer_map": [3, 5]}, "layer_map=[3, 5] names teacher layers [5], but they run from 1 to 4"),
        ({"heads": 3}, "head"),
    ],
)
def test_what_cannot_be_made_is_said_once(settings, said):
    (problem,) = check_students([tiny_student(**settings)], tiny_config("bert"), 32)
    assert problem.startswith("students.0 (s): ") and said in problem


def test_a_folder_of_another_shape(tmp_path):
    tiny_encoder("bert").save_pretrained(tmp_path)
    (problem,) = check_students([tiny_student(init=str(tmp_path))], tiny_config("bert"), 32)
    assert "hidden_size 24 against 48" in problem and "num_hidden_layers 2 against 4" in problem


def test_problems_of_all_students_come_together():
    students = [
        tiny_student(name="a", layers=3),
        tiny_student(name="fine"),
        tiny_student(name="b", heads=3, overrides={"nonsense": 1}),
    ]
    found = check_students(students, tiny_config("bert"), 65)
    assert [problem.split(":")[0] for problem in found] == [
        "the corpus has rows of 65 tokens, the teacher takes 64",
        "students.0 (a)",
        "students.0 (a)",
        "students.1 (fine)",
        "students.2 (b)",
        "students.2 (b)",
    ]
    assert "layer_map=uniform" in found[1] and "rows of 65 tokens, the student takes 64" in found[2]


def test_roberta_has_no_place_for_the_first_positions():
    teacher = tiny_config("roberta")
    assert teacher.max_position_embeddings == 66
    assert check_students([], teacher, 64) == []
    assert check_students([], teacher, 65) == ["the corpus has rows of 65 tokens, the teacher takes 64"]
    model = tiny_encoder("roberta")
    ids_BS = torch.full((1, 65), 5)
    assert model(input_ids=ids_BS[:, :64]).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError), match="index"):
        model(input_ids=ids_BS)


def test_transfer_resolves_what_a_student_learns():
    student = tiny_student(layer_map="uniform", heads=2)
    student.losses.layers, student.losses.attention = [0.5, 2.0], 3.0
    resolved = transfer(student, tiny_config("bert"))
    assert (resolved.layer_map, resolved.attention_heads) == ((2, 4), 2)
    assert (resolved.embedding, resolved.hidden, resolved.attention) == (1.0, 1.0, 3.0)
    assert resolved.layers == (0.5, 2.0)
    assert transfer(tiny_student(), tiny_config("bert")).layers == (1.0, 1.0)
    student.losses.attention_heads = 3
    with pytest.raises(ValueError, match="attention_heads"):
        transfer(student, tiny_config("bert"))
