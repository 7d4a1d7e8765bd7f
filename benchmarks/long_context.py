"""Rows of up to 8,192 tokens: a ModernBERT-like pair, with and without score matrices.

    python benchmarks/long_context.py [--json PATH] [--quick]

One optimizer step on one row, float32: teacher of 6 layers x 768, student of 3 layers x 312, 12 heads each,
two of three layers with a window of 128 tokens, as ModernBERT has them; hidden states and attention of all
student layers are learned. ``scores`` forms both models' score matrices of every mapped layer and leaves the
gradient to autograd; ``ours`` is ``trainer.transfer.distil``. Everything else is the same; both use SDPA.

Floor for S = 8192: the score matrices of one layer's 12 heads are 3.2 GB in float32, and autograd keeps at
least one such for each of 3 layers; ours keeps two tensors [12, S, 26] a layer, 20 MB.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from transformers import ModernBertConfig

from benchmarks.harness import Report, interleaved_medians, parse_arguments, peak_apart
from configs.student_schema import Projection
from trainer.capture import Captured, capture
from trainer.encoders import new_encoder
from trainer.layout import Counts, Layout
from trainer.models import Student
from trainer.transfer import Transfer, denominators, distil, student_need, teacher_need, total, weights

HEADS, TEACHER_WIDTH, VOCABULARY, LIMIT_GIB = 12, 768, 1000, 18.0
TRANSFER = Transfer(
    (2, 4, 6), attention_heads=HEADS, embedding=1.0, hidden=1.0, attention=1.0, layers=(1.0, 1.0, 1.0)
)


def encoder(layers: int, width: int, inner: int, seq_len: int) -> nn.Module:
    """A random ModernBERT."""
    special = {f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")}
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=seq_len,
        pad_token_id=0,
        **special,
    )
    return new_encoder(config)


def score_matrices(student: Captured, teacher: Captured, layout: Layout) -> dict[str, Tensor]:
    """Every term as ``distil`` has it, the attention term by its definition."""
    hidden_only = Transfer((2, 4, 6), HEADS, 1.0, 1.0, 0.0, (1.0, 1.0, 1.0))
    sums = distil(student, teacher, layout, hidden_only)
    for m, g in enumerate(TRANSFER.layer_map, start=1):
        q_S, k_S, q_T, k_T = (
            x
            for model, layer in ((student, m), (teacher, g))
            for x in (model.queries[layer - 1], model.keys[layer - 1])
        )
        error = q_S @ k_S.mT * student.scalings[m - 1] - q_T @ k_T.mT * teacher.scalings[g - 1]
        sums[f"attention/{m}"] = error.square().sum(dim=(1, 2, 3))
    return sums


def make_step(seq_len: int, way: str) -> Callable[[], None]:
    """One optimizer step on one row of ``seq_len`` tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    teacher = encoder(6, TEACHER_WIDTH, 1152, seq_len).to(device).eval().requires_grad_(False)
    student = Student(
        encoder(3, 312, 480, seq_len), TEACHER_WIDTH, Projection.separate, student_need(TRANSFER)
    ).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    ids_BS = torch.randint(5, VOCABULARY, (1, seq_len), device=device)
    layout = Layout(torch.ones_like(ids_BS, dtype=torch.bool), full=True)
    counted = denominators(TRANSFER, Counts(seq_len, seq_len**2, 1), TEACHER_WIDTH)
    losses = {
        "ours": lambda s, t: distil(s, t, layout, TRANSFER),
        "scores": lambda s, t: score_matrices(s, t, layout),
    }

    def step() -> None:
        with torch.no_grad():
            targets = capture(teacher, ids_BS, need=teacher_need([TRANSFER]))
        sums = losses[way](Captured(**student(ids_BS, None, torch.zeros_like(ids_BS))), targets)
        total(sums, counted, weights(TRANSFER)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure every length and print the table."""
    arguments = parse_arguments(__doc__)
    lengths, repeats = ([512, 1024], 1) if arguments.quick else ([1024, 2048, 4096, 8192], 3)
    report = Report("one step on one row, ModernBERT-like 6 x 768 to 3 x 312, float32")
    for seq_len in lengths:
        peaks = {way: peak_apart(make_step, seq_len, way, limit_gib=LIMIT_GIB) for way in ("ours", "scores")}
        fitting = {way: make_step(seq_len, way) for way, peak in peaks.items() if peak is not None}
        taken_s = interleaved_medians(fitting, repeats)
        report.add(
            S=seq_len,
            **{f"{way}, s": taken_s.get(way, "-") for way in peaks},
            **{f"{way}, MiB": peak or f"over {LIMIT_GIB:g} GiB" for way, peak in peaks.items()},
        )
    last = report.rows[-1]
    report.finish(
        f"S={last['S']}: a step takes {last['ours, s']:.1f} s and {last['ours, MiB']:,.0f} MiB; "
        f"with score matrices {last['scores, MiB']}{' MiB' * isinstance(last['scores, MiB'], float)}",
        arguments.json,
    )


if __name__ == "__main__":
    main()
