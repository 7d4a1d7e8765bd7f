"""An evaluation's results, made up, with numbers that are easy to follow."""

from launcher.results import Arm, Column, Results, Timing

SST2 = Column("sst2", "heldout", "accuracy", 872, 0.51)
MNLI = Column("mnli", "heldout", "accuracy", 9815, 0.35)
MISMATCHED = Column("mnli", "heldout-mismatched", "accuracy", 9832, 0.35)
DEVICE = "CPU, 2 threads"


def scores(**of_form: list[list[float]]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By form, a list of seeds' accuracies for each of the three columns."""
    return {
        form: {
            column.name: [{"accuracy": value} for value in values]
            for column, values in zip((SST2, MNLI, MISMATCHED), of_column, strict=False)
        }
        for form, of_column in of_form.items()
    }


def timings(**p50_ms: float) -> list[Timing]:
    """By form, the median for one row; 32 rows take 20 times as long."""
    return [
        Timing(
            form, DEVICE, rows, factor * ms, 1.2 * factor * ms, 1.5 * factor * ms, 1e3 * rows / factor / ms
        )
        for form, ms in p50_ms.items()
        for rows, factor in ((1, 1), (32, 20))
    ]


def made_results() -> Results:
    """A teacher, a student that keeps 98% in PyTorch and 95% in int8, and its size without a teacher."""
    size = {"shape": "4 layers x 312", "parameters": 14_500_000, "row_flops": 1_180_000_000}
    big = {"shape": "12 layers x 768", "parameters": 109_000_000, "row_flops": 22_350_000_000}
    forms = {"pytorch": 58_000_000, "onnx": 58_200_000, "int8": 14_900_000}
    teacher = Arm(
        "teacher",
        **big,
        file_bytes={name: 75 * size // 10 for name, size in forms.items()},
        scores=scores(pytorch=[[0.92], [0.84], [0.80]], onnx=[[0.92], [0.84], [0.80]]),
        timings=timings(pytorch=90.0, onnx=80.0),
    )
    student = Arm(
        "student",
        **size,
        file_bytes=forms,
        scores=scores(
            pytorch=[[0.90, 0.91, 0.92], [0.80, 0.82, 0.81], [0.78, 0.79, 0.80]],
            onnx=[[0.90, 0.91, 0.92], [0.80, 0.82, 0.81], [0.78, 0.79, 0.80]],
            int8=[[0.89, 0.88, 0.90], [0.79, 0.79, 0.79], [0.75, 0.76, 0.77]],
        ),
        timings=timings(pytorch=12.0, onnx=9.0, int8=4.0),
    )
    finetuned = Arm(
        "finetuned",
        **size,
        file_bytes={"pytorch": 58_000_000},
        scores=scores(pytorch=[[0.80, 0.82], [0.66], [0.64]]),
        timings=timings(pytorch=12.0),
    )
    return Results(
        name="evaluation",
        aim=0.96,
        ship=["student"],
        columns=[SST2, MNLI, MISMATCHED],
        teacher=teacher,
        arms=[student, finetuned],
        seq_len=128,
        batch_rows=[1, 32],
        machine={"CPU": "2 threads", "torch": "2.13.0"},
    )
