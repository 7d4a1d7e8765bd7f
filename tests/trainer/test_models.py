"""Students, against what transformers builds, loads and computes by itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.student_schema import LossConfig, Projection, StudentConfig
from sharding.stream import Batch
from tests.trainer.saved import checkpoint, keep
from tests.trainer.tiny import (
    ARCHITECTURES,
    HEADS,
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    rows,
    tiny_encoder,
    tiny_student,
)
from trainer.capture import enable_capture
from trainer.checkpoint import WEIGHTS, EngineState, save
from trainer.models import (
    Inputs,
    Student,
    build_student,
    check_starts,
    copy_layers,
    outline,
    parameters,
)
from trainer.shapes import check_students

CPU = torch.device("cpu")
SAME_SIZE = {"layers": LAYERS, "hidden_size": WIDTH, "heads": HEADS, "intermediate_size": INNER}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def transformer_layers(model: nn.Module) -> nn.ModuleList:
    """The encoder's layers, by the path that each architecture gives them."""
    for path in ("encoder.layer", "transformer.layer", "layers"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(type(model))


def build(student, teacher_type: str = "bert", seed: int = 3, **settings) -> tuple[Student, nn.Module]:
    teacher = tiny_encoder(teacher_type, **settings)
    assert check_students([student], teacher.config, 64) == []
    return build_student(student, lambda head: teacher, teacher.config, seed), teacher


@every_architecture
@pytest.mark.parametrize("teacher", ARCHITECTURES)
def test_a_student_has_the_shape_asked_for_and_reads_the_longest_rows(teacher, architecture):
    own = None if architecture == teacher else architecture
    config = tiny_student(architecture=own, projection=Projection.per_layer)
    student, _ = build(config, teacher)
    encoder = student.encoder
    assert encoder.config.model_type == architecture and encoder.config.vocab_size == VOCABULARY
    layers = transformer_layers(encoder)
    assert len(layers) == 2
    widths = {tuple(module.weight.shape) for module in layers.modules() if isinstance(module, nn.Linear)}
    if architecture == "modernbert":  # query, key and value in one; input and gate in one
        assert widths == {(72, 24), (24, 24), (80, 24), (24, 40)}
    else:
        assert widths == {(24, 24), (40, 24), (24, 40)}

    ids_BS, mask_BS = rows(2, 64)
    out = student(ids_BS, mask_BS, torch.zeros_like(ids_BS))
    assert [tuple(x.shape) for x in out["hidden"]] == [(2, 64, WIDTH)] * 3
    assert [tuple(x.shape) for x in out["queries"] + out["keys"]] == [(2, 2, 64, 12)] * 4
    assert out["scalings"] == [12**-0.5] * 2
    assert all(x.isfinite().all() for x in out["hidden"])


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra"])
def test_layers_of_the_teacher_are_copied_exactly(architecture):
    size = {**SAME_SIZE, "layers": 2}
    student, teacher = build(
        tiny_student(init="teacher", layer_map=[1, 4], projection=Projection.per_layer, **size), architecture
    )
    ours, theirs = transformer_layers(student.encoder), transformer_layers(teacher)
    for own, source in zip(ours, (theirs[0], theirs[3]), strict=True):
        assert own.state_dict().keys() == source.state_dict().keys()
        for name, value in own.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name
    embeddings = teacher.embeddings.state_dict()
    assert len(embeddings) >= 4
    for name, value in student.encoder.embeddings.state_dict().items():
        assert torch.equal(value, embeddings[name]), name
    assert len(student.projections) == 3
    for projection in student.projections:
        assert torch.equal(projection.weight, torch.eye(WIDTH))
    # A copy: training the student leaves the teacher as it is.
    before = teacher.state_dict()["embeddings.word_embeddings.weight"].clone()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert torch.equal(teacher.state_dict()["embeddings.word_embeddings.weight"], before)


@every_architecture
def test_a_copy_of_all_layers_computes_what_the_teacher_computes(architecture):
    student, teacher = build(tiny_student(init="teacher", **SAME_SIZE), architecture)
    ids_BS, mask_BS = rows()
    expected = teacher(input_ids=ids_BS, attention_mask=mask_BS.long(), output_hidden_states=True)
    out = student.eval()(ids_BS, mask_BS, torch.zeros_like(ids_BS))
    for ours, theirs in zip(out["hidden"], expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask_BS], theirs[mask_BS], atol=1e-6, rtol=1e-6)


def test_a_layer_that_has_no_place_in_the_student_is_refused():
    student = tiny_student(init="teacher", **{**SAME_SIZE, "layers": 2})
    teacher = tiny_encoder("modernbert")
    with pytest.raises(
        ValueError, match="layer 1 cannot start from teacher layer 2: only one of them has attn_norm.weight"
    ):
        build_student(student, lambda head: teacher, teacher.config, seed=0)
    student.layer_map = [1, 4]
    encoder = build_student(student, lambda head: teacher, teacher.config, seed=0).encoder
    assert torch.equal(encoder.final_norm.weight, teacher.final_norm.weight)
    assert torch.equal(encoder.layers[1].mlp.Wi.weight, teacher.layers[3].mlp.Wi.weight)


def test_copy_layers_takes_all_that_is_outside_the_layers():
    teacher = tiny_encoder("electra")
    encoder = tiny_encoder("electra", seed=9, num_hidden_layers=1)
    copy_layers(encoder, teacher, [2])
    assert torch.equal(encoder.embeddings_project.weight, teacher.embeddings_project.weight)
    assert torch.equal(encoder.encoder.layer[0].attention.self.query.weight,
                       teacher.encoder.layer[1].attention.self.query.weight)  # fmt: skip


def test_a_student_from_a_folder(tmp_path):
    source = tiny_encoder("bert", seed=11, num_hidden_layers=2, hidden_act="relu")
    source.save_pretrained(tmp_path)
    size = {**SAME_SIZE, "layers": 2, "init": str(tmp_path)}
    student, _ = build(tiny_student(**size, overrides={"hidden_dropout_prob": 0.25}))
    weights = {name: value for name, value in source.state_dict().items() if "pooler" not in name}
    assert weights.keys() == student.encoder.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in student.encoder.state_dict().items())
    assert student.encoder.config.hidden_act == "relu"  # of the pretrained encoder
    dropouts = {module.p for module in student.encoder.embeddings.modules() if isinstance(module, nn.Dropout)}
    assert dropouts == {0.25}
    assert not torch.equal(student.projections[0].weight, torch.eye(WIDTH))


def saved(folder: Path, student: StudentConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a student of this config, and what its weights are."""
    module = build_student(student, lambda head: None, tiny_encoder("bert").config, seed=77)
    weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    state = EngineState(weights, {}, updates=5, loss_scale={})
    whole = replace(checkpoint(5), students={student.name: state})
    return save(folder, whole, keep(1)) / student.name, weights


@pytest.mark.parametrize("prediction", [0.0, 1.0], ids=["encoder", "with its head"])
def test_a_student_from_a_checkpoint(tmp_path, prediction):
    shape = {"losses": LossConfig(prediction=prediction), "projection": Projection.per_layer}
    folder, weights = saved(tmp_path, tiny_student(**shape))
    teacher = tiny_encoder("bert").config
    for init in (folder, tmp_path / "latest" / folder.name):
        student = tiny_student(**shape, init=str(init), overrides={"hidden_dropout_prob": 0.25})
        assert check_students([student], teacher, 64) == check_starts([student], teacher) == []
        found = dict(build_student(student, lambda head: None, teacher, seed=3).named_parameters())
        assert found.keys() == weights.keys() and len([name for name in found if "projections" in name]) == 3
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_checkpoint_of_another_student_is_refused_with_every_difference(tmp_path):
    folder, _ = saved(tmp_path, tiny_student(projection=Projection.shared))
    teacher = tiny_encoder("bert").config
    other = tiny_student(init=str(folder), layers=1, intermediate_size=36)
    assert check_students([other], teacher, 64) == []
    (said,) = check_starts([tiny_student(), other, tiny_student(init="teacher")], teacher)
    assert said.startswith(f"students.1 (s): init={str(folder)!r} is not the same student: ")
    for part in (
        "encoder.encoder.layer.0.intermediate.dense.weight (40, 24) instead of (36, 24)",
        "encoder.encoder.layer.0.intermediate.dense.bias (40,) instead of (36,)",
        "encoder.encoder.layer.0.output.dense.weight (24, 40) instead of (24, 36)",
        "encoder.encoder.layer.1.output.LayerNorm.bias (24,) instead of nothing",
        "projections.1.weight missing instead of (48, 24)",
    ):
        assert part in said
    assert said.count(" instead of ") == 3 + 16 + 1


def test_a_damaged_checkpoint_is_no_start(tmp_path):
    folder, _ = saved(tmp_path, tiny_student())
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    (said,) = check_starts([tiny_student(init=str(folder))], tiny_encoder("bert").config)
    assert "is damaged: s/weights.safetensors does not match its checksum. Use another checkpoint" in said


def test_an_outline_is_the_student_without_weights(tmp_path):
    teacher = tiny_encoder("bert").config
    source = tiny_encoder("bert", num_hidden_layers=2, hidden_act="relu")
    source.save_pretrained(tmp_path)
    size = {**SAME_SIZE, "layers": 2}
    for student in (tiny_student(), tiny_student(**size, init=str(tmp_path))):
        whole, empty = build_student(student, lambda head: None, teacher, seed=0), outline(student, teacher)
        assert all(value.is_meta for value in empty.state_dict().values())
        shapes = [{k: v.shape for k, v in module.named_parameters()} for module in (whole, empty)]
        assert shapes[0] == shapes[1]
        assert whole.encoder.config.to_diff_dict() == empty.encoder.config.to_diff_dict()


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    return list(module.state_dict().values())


def test_initial_weights_depend_on_the_seed_alone():
    config = tiny_student()
    teacher = tiny_encoder("bert")

    def build_with(seed: int) -> list[torch.Tensor]:
        return weights_of(build_student(config, lambda head: teacher, teacher.config, seed))

    torch.manual_seed(100)
    first = build_with(3)
    torch.rand(17)
    build_with(4)
    again, other = build_with(3), build_with(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    differing = [not torch.equal(a, b) for a, b in zip(first, other, strict=True)]
    assert sum(differing) > len(differing) / 3  # all but biases and norms


def test_building_draws_nothing_from_the_global_generator():
    teacher = tiny_encoder("bert")
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    build_student(tiny_student(), lambda head: teacher, teacher.config, seed=5)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "projection, of_layer",
    [
        (Projection.shared, [0, 0, 0, 0]),
        (Projection.separate, [0, 1, 1, 1]),
        (Projection.per_layer, [0, 1, 2, 3]),
    ],
)
def test_projections_and_where_their_gradients_come_from(projection, of_layer):
    student, _ = build(tiny_student(layers=3, layer_map=[1, 2, 4], projection=projection))
    student.eval()
    assert len(student.projections) == max(of_layer) + 1
    assert all(tuple(module.weight.shape) == (WIDTH, 24) for module in student.projections)
    assert parameters(student) == sum(value.numel() for value in student.encoder.parameters()) + (
        WIDTH * 24 * len(student.projections)
    )
    ids_BS, mask_BS = rows()
    plain = student.encoder(ids_BS, attention_mask=mask_BS, output_hidden_states=True).hidden_states
    for layer, index in enumerate(of_layer):
        student.zero_grad()
        hidden = student(ids_BS, mask_BS, torch.zeros_like(ids_BS))["hidden"][layer]
        torch.testing.assert_close(hidden, plain[layer] @ student.projections[index].weight.mT)
        hidden.square().sum().backward()
        reached = [module.weight.grad is not None for module in student.projections]
        assert reached == [number == index for number in range(len(student.projections))]


def test_inputs_of_a_batch_by_hand():
    batch = Batch(
        position=4,
        ids_BS=torch.tensor([[2, 9, 3, 0, 0], [2, 9, 3, 8, 3], [2, 7, 6, 3, 0], [0, 0, 0, 0, 0]]),
        length_B=torch.tensor([3, 5, 4, 0]),
        segment_B=torch.tensor([3, 3, 4, 0]),
        corpus_B=torch.tensor([0, 0, 0, 0]),
        block_B=torch.tensor([0, 0, 1, 1]),
        row_B=torch.arange(4),
    )
    inputs = Inputs.of(batch, slice(0, 2), CPU)
    assert inputs.ids_BS.tolist() == [[2, 9, 3, 0, 0], [2, 9, 3, 8, 3]]
    assert inputs.layout.mask_BS.tolist() == [[True, True, True, False, False], [True] * 5]
    assert inputs.token_type_BS.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert (inputs.layout.mask_BS.dtype, inputs.token_type_BS.dtype) == (torch.bool, torch.int64)
    rest = Inputs.of(batch, slice(2, 5), CPU)
    assert rest.layout.mask_BS.tolist() == [[True, True, True, True, False], [False] * 5]
    # A row without a valid token is attended to somewhere, and counts nowhere.
    assert rest.attention_mask.tolist() == [[True, True, True, True, False], [True] + [False] * 4]
    assert rest.token_type_BS[1].tolist() == [0] * 5


def test_a_student_is_ready_to_be_captured():
    student, teacher = build(tiny_student())
    enable_capture(teacher)
    assert student.encoder.config._attn_implementation == teacher.config._attn_implementation
    assert {value.dtype for value in student.parameters()} == {torch.float32}
    assert not [name for name, _ in student.named_parameters() if "pooler" in name]


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_compiled_student_is_the_same_student(architecture):
    found = []
    for compiled in (False, True):
        student, _ = build(tiny_student(layers=3, layer_map=[1, 2, 4], compile=compiled), architecture)
        ids_BS, mask_BS = rows()
        torch._dynamo.utils.counters.clear()
        out = student.eval()(ids_BS, mask_BS, torch.zeros_like(ids_BS))
        sum(x.square().sum() for x in out["hidden"] + out["queries"] if x is not None).backward()
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
        found.append([x for x in out["hidden"] + out["keys"] if x is not None])
        found[-1] += [parameter.grad for parameter in student.parameters()]
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
