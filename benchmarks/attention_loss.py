"""The attention loss alone, forward and backward: the Gram form against direct scores.

    python benchmarks/attention_loss.py [--json PATH] [--quick]

Three ways to the same number, of one layer of 12 heads in float32, for the two published students of
BERT-base (D_T = 64): 4x312 (D_S = 26) and 6x768 (D_S = 64). ``plain`` forms both score matrices and takes
their masked MSE, as one would write it; ``direct`` and ``gram`` are the two methods of
``trainer.losses.attention_error_sum``.

Floor, multiply-adds per head and direction: direct S^2 (D_S + D_T), Gram 2 S (D_S + D_T)^2; so the arithmetic
is equal at S = 2 (D_S + D_T), 180 or 256, and Gram wins by S over that beyond, before memory traffic counts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import Report, interleaved_medians, parse_arguments
from trainer.losses import attention_error_sum

HEADS, STUDENT_DIMS, TEACHER_DIM = 12, (26, 64), 64
TOKENS = 2048  # rows x S stays the same, as it does in a real micro batch


def plain_error_sum(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask_BS: Tensor) -> Tensor:
    """The loss as one writes it down: two score matrices, a mask, a sum of squares."""
    scores_S = q_S @ k_S.mT * q_S.shape[-1] ** -0.5
    scores_T = q_T @ k_T.mT * q_T.shape[-1] ** -0.5
    valid_B1SS = (mask_BS[:, :, None] & mask_BS[:, None, :])[:, None]
    return (scores_S - scores_T).masked_fill(~valid_B1SS, 0).square().sum()


def measure(seq_len: int, student_dim: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of each of the three at one length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = max(1, TOKENS // seq_len)
    torch.manual_seed(0)
    student = [torch.randn(rows, HEADS, seq_len, student_dim, device=device) for _ in range(2)]
    teacher = [torch.randn(rows, HEADS, seq_len, TEACHER_DIM, device=device) for _ in range(2)]
    leaves = [x.requires_grad_() for x in student]
    mask_BS = torch.ones(rows, seq_len, dtype=torch.bool, device=device)
    scalings = (student_dim**-0.5, TEACHER_DIM**-0.5)

    def plain() -> None:
        torch.autograd.grad(plain_error_sum(*student, *teacher, mask_BS), leaves)

    def ours(method: str) -> None:
        loss = attention_error_sum(*student, *teacher, *scalings, mask_BS, method)
        torch.autograd.grad(loss, leaves)

    return interleaved_medians(
        {"plain": plain, "direct": lambda: ours("direct"), "gram": lambda: ours("gram")}, repeats
    )


def main() -> None:
    """Measure every length and print the table."""
    arguments = parse_arguments(__doc__)
    lengths = [128, 512] if arguments.quick else [128, 256, 512, 1024, 2048]
    report = Report("attention loss, forward + backward, milliseconds per 2,048 tokens")
    speed_up = {}
    for student_dim in STUDENT_DIMS:
        for seq_len in lengths:
            taken_s = measure(seq_len, student_dim, repeats=3 if arguments.quick else 9)
            speed_up[student_dim, seq_len] = ratio = taken_s["plain"] / taken_s["gram"]
            milliseconds = {name: 1e3 * median_s for name, median_s in taken_s.items()}
            report.add(D_S=student_dim, S=seq_len, **milliseconds, **{"plain / gram": ratio})
    at_128, at_512 = speed_up[26, 128], speed_up[26, 512]
    report.finish(f"4x312: gram runs at {at_128:.1f}x plain at S=128, {at_512:.1f}x at S=512", arguments.json)


if __name__ == "__main__":
    main()
