"""The teacher's pass: the stock model as a user would call it, and ours in every precision.

    python benchmarks/teacher.py [--json PATH] [--quick] [--rows N] [--repeats N]

A BERT-base of random weights, 4x312's uniform layer map. Deviations are from our float32 teacher, on the same
rows; ``loss`` is that of a 4x312 student of random weights. ``launcher/preflight.py`` measures them on a real
teacher and corpus.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModel, BertConfig, BertModel

from benchmarks.harness import Report, benchmark_parser, interleaved_medians
from configs.schema import Precision, Quantization, RunConfig, TeacherConfig
from configs.student_schema import LossConfig, RelationConfig, StudentConfig
from trainer.capture import Captured
from trainer.deviation import deviations
from trainer.flops import teacher_row_flops
from trainer.layout import Layout
from trainer.models import Inputs, build_student
from trainer.shapes import transfer
from trainer.teacher import Teacher, check_machine, load_teacher
from trainer.transfer import teacher_need
from trainer.world import World

STUDENT = StudentConfig("4x312", layers=4, hidden_size=312, heads=12, intermediate_size=1200)
RELATIONS = StudentConfig(
    "relations",
    layers=4,
    hidden_size=384,
    heads=12,
    intermediate_size=1536,
    losses=LossConfig(embedding=0, hidden=0, attention=0, relation=RelationConfig(1.0, teacher_layer=9)),
)
KINDS = {
    "ours fp32": TeacherConfig(precision=Precision.fp32),
    "ours bf16": TeacherConfig(precision=Precision.bf16),
    "ours fp16": TeacherConfig(precision=Precision.fp16),
    "ours bf16 compiled": TeacherConfig(precision=Precision.bf16, compile=True),
    "ours int8 + bf16": TeacherConfig(precision=Precision.bf16, quantization=Quantization.int8),
    "ours int8 + bf16 compiled": TeacherConfig(
        precision=Precision.bf16, quantization=Quantization.int8, compile=True
    ),
    "ours fp8 + bf16": TeacherConfig(precision=Precision.bf16, quantization=Quantization.fp8),
    "ours fp8 + bf16 compiled": TeacherConfig(
        precision=Precision.bf16, quantization=Quantization.fp8, compile=True
    ),
}


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rows", type=int, help="rows of a micro batch at S = 128; at 512 a quarter")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = arguments.rows or (256 if device.type == "cuda" else 16)
    repeats = 1 if arguments.quick else arguments.repeats
    report, headlines = Report("the teacher's pass: BERT-base, uniform map to 4 layers"), []
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(num_hidden_layers=2 if arguments.quick else 12)
        student = STUDENT if not arguments.quick else StudentConfig(**{**vars(STUDENT), "layers": 2})
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
        for seq_len in (128,) if arguments.quick else (128, 512):
            rate = measure(report, folder, student, rows * 128 // seq_len, seq_len, device, repeats)
            headlines.append(f"S={seq_len}: bf16 {rate['ours bf16'] / rate['stock fp32']:.2f}x stock fp32")
    report.finish("; ".join(headlines), arguments.json)


def measure(
    report: Report,
    folder: str,
    student: StudentConfig,
    rows: int,
    seq_len: int,
    device: torch.device,
    repeats: int,
) -> dict[str, float]:
    """Add a row for every kind of teacher; return rows/s by kind."""
    place = World(0, 1, 0, 1, device)
    calls: dict[str, Callable[[], object]] = {}
    ids_BS = torch.randint(1000, 30000, (rows, seq_len), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    full = Layout(torch.ones_like(ids_BS, dtype=torch.bool), full=True)
    inputs = Inputs(ids_BS, full, None, torch.zeros_like(ids_BS))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        stock = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        calls[f"stock {name}"] = lambda stock=stock: as_a_user_would(stock, ids_BS)
    hf_config = stock.config
    learned = transfer(student, hf_config)
    teachers: dict[str, Teacher] = {}
    for name, kind in KINDS.items():
        if not check_machine(RunConfig("teacher", "unused", kind, [student]), device):
            found = TeacherConfig(**{**vars(kind), "model": folder})
            teachers[name] = load_teacher(found, teacher_need([learned]), place)
    if hf_config.num_hidden_layers >= 9:
        found = TeacherConfig(folder, precision=Precision.bf16)
        need = teacher_need([transfer(RELATIONS, hf_config)])
        teachers["ours bf16, layer 9's Q, K, V only"] = load_teacher(found, need, place)
    for name, teacher in teachers.items():
        calls[name] = lambda teacher=teacher: teacher(inputs)
    medians = interleaved_medians(calls, repeats)
    module = build_student(student, lambda head: stock, hf_config, seed=0).to(device).eval()

    def learn(inputs: Inputs) -> Captured:
        return Captured(**module(inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS))

    flops = rows * teacher_row_flops(hf_config, seq_len, teacher_need([learned]))
    few = Inputs(ids_BS[:4], Layout(full.mask_BS[:4], full=True), None, inputs.token_type_BS[:4])
    for name, seconds in medians.items():
        own: dict[str, float] = {}
        if name in KINDS:
            own = deviations(teachers[name], teachers["ours fp32"], [(learn, learned)], few, 768)
        whole = "only" not in name
        report.add(
            S=seq_len,
            rows=rows,
            teacher=name,
            rows_per_s=rows / seconds,
            gflop_per_s=flops / seconds / 1e9 if whole else "",
            **{f"{kind} deviation": own.get(kind, "") for kind in ("hidden", "scores", "loss")},
        )
    return {name: rows / seconds for name, seconds in medians.items()}


@torch.no_grad()
def as_a_user_would(stock: BertModel, ids_BS: torch.Tensor) -> object:
    """All hidden states and the pooler's output, with a mask."""
    return stock(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), output_hidden_states=True)


if __name__ == "__main__":
    main()
