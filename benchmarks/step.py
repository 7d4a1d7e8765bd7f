"""The whole step, BERT-base to 4x312: the published algorithm against ours, and the floor under both.

    python benchmarks/step.py [--json PATH] [--quick] [--tokens N] [--repeats N]

Random weights, rows without padding, one optimizer step of one micro batch, the student in float32.

published      the released algorithm written plainly: teacher in float32, in training mode, its graph kept;
               scores of all layers of both models formed, masked entries found by comparing with -100
at its best    the same loss: teacher in bfloat16, evaluation mode, without a graph; scores formed for the
               mapped layers only, fused attention elsewhere
ours           the step of ``trainer/loop.py``, DeepSpeed at ZeRO 1, teacher in float32, bfloat16, compiled

``of floor`` is the floor's share of the step. The floor is what the step's matrix products take at the
measured rate of such products in their number format, the losses' own left out (``trainer/flops.py``).
Attention dropout, which BERT's config sets to 0.1, keeps torch from its fused kernel on CPU: the last rows
are without.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import AttentionInterface, AutoConfig, AutoModel, BertConfig, BertModel

from benchmarks.harness import Report, benchmark_parser, interleaved_medians
from configs.deepspeed import derive
from configs.schema import DeepSpeedConfig, Precision, RunConfig, TeacherConfig, TrainConfig
from configs.student_schema import StudentConfig
from sharding.stream import Batch
from trainer import engine, meeting, world
from trainer.checkpoint import Progress
from trainer.clock import Clock
from trainer.encoders import DTYPES
from trainer.flops import matrix_rate, student_row_flops, teacher_row_flops
from trainer.loop import Run, Trainee, accumulate_gradients
from trainer.meter import SpeedMeter
from trainer.models import build_student
from trainer.shapes import transfer
from trainer.teacher import check_machine, load_teacher
from trainer.transfer import student_need, teacher_need
from trainer.world import World

VOCABULARY, LAYERS, STUDENT_LAYERS = 30522, 12, 4
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0}


def student_config(name: str = "4x312", **settings: Any) -> StudentConfig:
    """The paper's 4x312."""
    return StudentConfig(
        name, layers=STUDENT_LAYERS, hidden_size=312, heads=12, intermediate_size=1200, **settings
    )


def make_batch(rows: int, seq_len: int) -> Batch:
    """Rows of random ids without padding."""
    ids_BS = torch.randint(1000, VOCABULARY, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    length_B, zero_B = torch.full((rows,), seq_len), torch.zeros(rows, dtype=torch.int64)
    return Batch(rows, ids_BS, length_B, length_B, zero_B, zero_B, zero_B)


class Ours:
    """One call is one step of our loop, from a batch that is there to updated weights."""

    def __init__(
        self,
        teacher: TeacherConfig,
        students: list[StudentConfig],
        place: World,
        batches: Iterable[Batch],
        rows: int,
        micro_batch_rows: int,
        zero_stage: int = 1,
        precision: Precision = Precision.fp32,
    ) -> None:
        train = TrainConfig(rows * place.size, micro_batch_rows, steps=1)
        settings = DeepSpeedConfig(zero_stage, precision=precision)
        config = RunConfig("step", "unused", teacher, students, train=train, deepspeed=settings)
        whole = AutoConfig.from_pretrained(teacher.model)
        learned = [transfer(student, whole) for student in students]
        trainees = []
        for student, own in zip(students, learned, strict=True):
            module = build_student(student, lambda head: None, whole, seed=0)
            trainees.append(Trainee(student, own, self.engine(config, student, module, place)))
        self.run = Run(
            config=config,
            world=place,
            corpora=None,
            teach=load_teacher(teacher, teacher_need(learned), place),
            teacher_hidden_size=whole.hidden_size,
            trainees=trainees,
            speed=SpeedMeter(None, 0.0, Clock(place.device)),
            progress=Progress(),
            total_steps=1,
        )
        self.batches = self.run.speed.timed(batches)
        self()  # compilation and first allocations are no part of what is measured
        self.split()

    def engine(self, config: RunConfig, student: StudentConfig, module: nn.Module, place: World) -> Any:
        """What the student trains in."""
        pinned = place.device.type == "cuda"
        made = engine.Engine(module, student.optimizer, derive(config, student, place.size, pinned), place)
        made.train()
        return made

    def __call__(self) -> None:
        batch = next(self.batches)
        tokens, _ = accumulate_gradients(self.run, batch)
        for trainee in self.run.trainees:
            with self.run.speed.clock.part(f"{trainee.config.name}/optimizer"):
                trainee.engine.step(1e-4)
        self.run.speed.add(len(batch.length_B), tokens)

    def split(self) -> dict[str, float]:
        """Seconds of every part of a step, since the last call."""
        figures = self.run.speed.report(0, self.run.world)
        return {part: figures[f"time/{part}_s"] for part in PARTS}


class Published:
    """One call is one step of the released algorithm; ``best`` is the same at its best."""

    def __init__(self, folder: str, student: StudentConfig, batch: Batch, device: torch.device, best: bool):
        self.best = best
        dtype = torch.bfloat16 if best else torch.float32
        self.teacher = AutoModel.from_pretrained(folder, dtype=dtype, add_pooling_layer=False).to(device)
        self.teacher.train(not best)
        shape = BertConfig(
            hidden_size=312,
            num_hidden_layers=STUDENT_LAYERS,
            num_attention_heads=12,
            intermediate_size=1200,
            **student.overrides,
        )
        self.student = BertModel(shape, add_pooling_layer=False).to(device).train()
        for model in (self.teacher, self.student):
            model.set_attn_implementation("plain_scores")
        self.projection = nn.Linear(312, self.teacher.config.hidden_size).to(device)
        parameters = [*self.student.parameters(), *self.projection.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
        self.ids_BS = batch.ids_BS.to(device)
        self.every = self.teacher.config.num_hidden_layers // STUDENT_LAYERS

    def __call__(self) -> None:
        mapped = [number * self.every for number in range(1, STUDENT_LAYERS + 1)]
        with torch.set_grad_enabled(not self.best):
            formed = mapped if self.best else range(1, self.teacher.config.num_hidden_layers + 1)
            scores_T, hidden_T = self.encode(self.teacher, formed)
        scores_S, hidden_S = self.encode(self.student, range(1, STUDENT_LAYERS + 1))
        loss = mse_loss(self.projection(hidden_S[0]), hidden_T[0].detach().float())
        for number, layer in enumerate(mapped, start=1):
            error = known(scores_S[number]) - known(scores_T[layer].detach().float())
            loss = loss + error.square().mean()
            loss = loss + mse_loss(self.projection(hidden_S[number]), hidden_T[layer].detach().float())
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def encode(self, model: BertModel, formed: Sequence[int]) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        """Scores of the ``formed`` layers and all hidden states."""
        mask_BS = torch.ones_like(self.ids_BS)
        added_B11S = ((1 - mask_BS) * -10000.0)[:, None, None, :].to(model.dtype)
        scores: dict[int, Tensor] = {}
        _Formed.now = _Formed(set(formed), scores)
        output = model(input_ids=self.ids_BS, attention_mask=added_B11S, output_hidden_states=True)
        return scores, output.hidden_states


class _Formed:
    """Whose scores are kept in the forward pass that runs."""

    now: "_Formed"

    def __init__(self, wanted: set[int], scores: dict[int, Tensor]) -> None:
        self.wanted, self.scores, self.calls = wanted, scores, 0


def plain_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by its definition, where its scores are wanted; elsewhere the fused kernel."""
    state = _Formed.now
    state.calls += 1
    if state.calls in state.wanted:
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores if attention_mask is None else scores + attention_mask
        state.scores[state.calls] = scores
        chosen = nn.functional.dropout(scores.softmax(dim=-1), dropout, module.training)
        output = chosen @ value
    else:
        rate = dropout if module.training else 0.0
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout_p=rate, scale=scaling
        )
    return output.transpose(1, 2).contiguous(), None


def known(scores: Tensor) -> Tensor:
    """Scores without the masked ones, which are taken to be those not above -100."""
    return torch.where(scores <= -100, torch.zeros_like(scores), scores)


AttentionInterface.register("plain_scores", plain_scores)


def floor_s(
    teacher: Any, student: StudentConfig, seq_len: int, place: World
) -> Callable[[Precision, Precision], float]:
    """Return the seconds that a row's products take at the measured rate, by both models' precisions."""
    rates = {dtype: matrix_rate(dtype, place.device) for dtype in (torch.float32, torch.bfloat16)}
    learned = transfer(student, teacher)
    of_teacher = teacher_row_flops(teacher, seq_len, teacher_need([learned]))
    shape = build_student(student, lambda head: None, teacher, seed=0).encoder.config
    of_student = student_row_flops(shape, seq_len, student_need(learned), teacher.hidden_size)

    def seconds(of: Precision, student: Precision) -> float:
        return of_teacher / rates[DTYPES[of]] + of_student / rates[DTYPES[student]]

    for dtype, rate in rates.items():
        print(f"matrix products in {dtype}: {rate / 1e9:.0f} GFLOP/s")
    print(f"S={seq_len}: teacher {of_teacher / 1e9:.2f}, student {of_student / 1e9:.2f} GFLOP a row")
    return seconds


def measure(
    report: Report, folder: str, place: World, seq_len: int, tokens: int, repeats: int
) -> dict[str, float]:
    """Add a row for every candidate; return rows/s by name."""
    rows = tokens // seq_len
    batch = make_batch(rows, seq_len)
    fp32, bf16 = (TeacherConfig(folder, precision=kind) for kind in (Precision.fp32, Precision.bf16))
    compiled = TeacherConfig(folder, precision=Precision.bf16, compile=True)
    ours = partial(Ours, place=place, batches=repeat(batch), rows=rows, micro_batch_rows=rows)
    calls: dict[str, Any] = {}
    for suffix, overrides in (("", {}), (", no attention dropout", NO_DROPOUT)):
        student = student_config(overrides=overrides)
        if not suffix:
            calls["published"] = Published(folder, student, batch, place.device, best=False)
        calls["published at its best" + suffix] = Published(folder, student, batch, place.device, best=True)
        calls["ours fp32" + suffix] = ours(fp32, [student])
        calls["ours bf16" + suffix] = ours(bf16, [student])
    calls["ours bf16, student too" + suffix] = ours(bf16, [student], precision=Precision.bf16)
    if not check_machine(RunConfig("step", "unused", compiled, [student]), place.device):
        calls["ours bf16 compiled" + suffix] = ours(compiled, [student])
    floor = floor_s(calls["ours bf16"].run.teach.config, student, seq_len, place)
    medians = interleaved_medians(calls, repeats)
    for name, seconds in medians.items():
        least_s = rows * floor(*precisions(name))
        split = calls[name].split() if isinstance(calls[name], Ours) else {}
        report.add(
            S=seq_len,
            step=name,
            rows_per_s=rows / seconds,
            step_s=seconds,
            **{"of floor": least_s / seconds},
            **{part: 1e3 * split[part] if split else "" for part in PARTS},
        )
    return {name: rows / seconds for name, seconds in medians.items()}


def precisions(name: str) -> tuple[Precision, Precision]:
    """Return the teacher's and the student's number format in a candidate of this name."""
    exact = name == "published" or name.startswith("ours fp32")
    teacher = Precision.fp32 if exact else Precision.bf16
    return teacher, Precision.bf16 if "student too" in name else Precision.fp32


PARTS = ("data", "teacher", "forward", "losses", "backward", "optimizer", "other")


def connected() -> World:
    """Return this process's place in the world, connected, DeepSpeed attached."""
    place = world.find(os.environ)
    world.share_cores(place, None)
    meeting.connect(place, os.environ)
    engine.attach()
    return place


def teacher_folder(folder: str, layers: int) -> str:
    """A BERT-base of random weights in ``folder``."""
    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=layers)).save_pretrained(folder)
    return folder


def main() -> None:
    """Measure both lengths and print the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    place = connected()
    report, headlines = Report("one step, BERT-base to 4x312; last columns: milliseconds"), []
    with tempfile.TemporaryDirectory() as folder:
        teacher_folder(folder, STUDENT_LAYERS if arguments.quick else LAYERS)
        for seq_len in (128,) if arguments.quick else (128, 512):
            tokens, repeats = (512, 1) if arguments.quick else (arguments.tokens, arguments.repeats)
            rate = measure(report, folder, place, seq_len, tokens, repeats)
            best, plain = "published at its best", ", no attention dropout"
            low = rate[f"ours bf16, student too{plain}"]
            headlines.append(
                f"S={seq_len}: ours, both models in bf16, {low / rate['published']:.1f}x published, "
                f"{low / rate[best + plain]:.1f}x at its best; with the student in float32 "
                f"{rate['ours bf16' + plain] / rate['published']:.1f}x, "
                f"{rate['ours bf16' + plain] / rate[best + plain]:.1f}x"
            )
    report.finish("; ".join(headlines), arguments.json)
    world.disconnect()


if __name__ == "__main__":
    main()
