"""The attention loss alone, forward and backward: time and memory of its forms.

    python benchmarks/attention_loss.py [--json PATH] [--quick]

One layer of 12 heads in float32, rows without padding, for the two published students of BERT-base (D_T =
64): 4x312 (D_S = 26) and 6x768 (D_S = 64). Queries and keys lie in memory as an encoder leaves them.

``plain`` is the loss as one writes it down: two score matrices, a mask, a sum of squares; ``bare`` is that
without the mask. ``direct`` and ``gram`` are the two forms of ``trainer.attention_loss.attention_error_sum``,
and ``auto`` says which of them it takes.

Memory is what a process of its own holds at its peak beyond the inputs: resident memory on CPU, where the
process may take what the machine has left (``-``: that was too little), allocated memory on CUDA.

Arithmetic, multiply-adds a head: direct S^2 (3 D_S + D_T), as plain; Gram S (4 D_S^2 + 4 D_S D_T + 2 D_T^2).
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import Report, interleaved_medians, parse_arguments, peak_apart
from trainer.attention_loss import attention_error_sum, faster_method

HEADS, STUDENT_DIMS, TEACHER_DIM = 12, (26, 64), 64
TOKENS = 2048  # rows x S stays the same, as it does in a real micro batch; one row where S is more
LIMIT_GIB = 18.0
CANDIDATES = ("plain", "bare", "direct", "gram")


def plain_error_sum(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask_BS: Tensor | None) -> Tensor:
    """The loss as one writes it down: two score matrices, a mask, a sum of squares."""
    scores_S = q_S @ k_S.mT * q_S.shape[-1] ** -0.5
    scores_T = q_T @ k_T.mT * q_T.shape[-1] ** -0.5
    error = scores_S - scores_T
    if mask_BS is not None:
        error = error.masked_fill(~(mask_BS[:, :, None] & mask_BS[:, None, :])[:, None], 0)
    return error.square().sum()


def calls(seq_len: int, student_dim: int) -> dict[str, Callable[[], object]]:
    """Return every candidate's forward and backward pass on the same inputs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = max(1, TOKENS // seq_len)
    torch.manual_seed(0)

    def heads(dim: int) -> Tensor:
        return torch.randn(rows, seq_len, HEADS, dim, device=device).transpose(1, 2)

    leaves = [heads(student_dim).requires_grad_() for _ in range(2)]
    teacher = [heads(TEACHER_DIM) for _ in range(2)]
    mask_BS = torch.ones(rows, seq_len, dtype=torch.bool, device=device)
    scalings = (student_dim**-0.5, TEACHER_DIM**-0.5)

    def ours(method: str) -> object:
        return torch.autograd.grad(
            attention_error_sum(*leaves, *teacher, *scalings, None, method).sum(), leaves
        )

    return {
        "plain": lambda: torch.autograd.grad(plain_error_sum(*leaves, *teacher, mask_BS), leaves),
        "bare": lambda: torch.autograd.grad(plain_error_sum(*leaves, *teacher, None), leaves),
        "direct": lambda: ours("direct"),
        "gram": lambda: ours("gram"),
    }


def one(candidate: str, seq_len: int, student_dim: int) -> Callable[[], object]:
    """Return one candidate's call."""
    return calls(seq_len, student_dim)[candidate]


def measure(seq_len: int, student_dim: int, repeats: int) -> dict[str, object]:
    """Return one row of the table: MiB, then milliseconds per 2,048 tokens, of every candidate that fits."""
    peaks = {name: peak_apart(one, name, seq_len, student_dim, limit_gib=LIMIT_GIB) for name in CANDIDATES}
    every = calls(seq_len, student_dim)
    taken_s = interleaved_medians(
        {name: every[name] for name in CANDIDATES if peaks[name] is not None}, repeats
    )
    per_tokens = 1e3 * TOKENS / max(TOKENS, seq_len)
    auto = faster_method(seq_len, student_dim, TEACHER_DIM)
    return {
        "D_S": student_dim,
        "S": seq_len,
        **{f"{name} ms": per_tokens * taken_s[name] if name in taken_s else "-" for name in CANDIDATES},
        "auto": auto,
        "plain / auto": taken_s["plain"] / taken_s[auto] if "plain" in taken_s else "-",
        **{f"{name} MiB": "-" if peaks[name] is None else peaks[name] for name in CANDIDATES},
    }


def main() -> None:
    """Measure every length and print the table."""
    arguments = parse_arguments(__doc__)
    report = Report("attention loss, forward + backward: ms per 2,048 tokens, peak MiB beyond the inputs")
    for student_dim in STUDENT_DIMS[: 1 if arguments.quick else 2]:
        for seq_len in (128, 512) if arguments.quick else (128, 256, 512, 1024, 2048, 8192):
            repeats = 3 if arguments.quick else 9 if seq_len <= 512 else 3 if seq_len <= 2048 else 1
            report.add(**measure(seq_len, student_dim, repeats))
    headline = []
    for row in report.rows:
        if row["D_S"] == STUDENT_DIMS[0] and row["S"] in (128, 512, 2048, 8192):
            less = row["plain MiB"] / row[f"{row['auto']} MiB"] if row["plain MiB"] != "-" else float("inf")
            headline.append(f"{row['plain / auto']:.1f}x at S={row['S']} ({less:.0f}x less memory)")
    report.finish(f"4x312: auto runs at {', '.join(headline)} of plain", arguments.json)


if __name__ == "__main__":
    main()
