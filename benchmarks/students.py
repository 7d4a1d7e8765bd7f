"""What further students cost: 1, 2, 4 and 8 students of 4x312 on one teacher pass against as many runs.

    python benchmarks/students.py [--json PATH] [--quick] [--tokens N] [--repeats N]

BERT-base of random weights in bfloat16, students in bfloat16 with float32 masters as the shipped configs have
them, and in float32; DeepSpeed at ZeRO 1, one optimizer step of one micro batch of rows of 128 tokens,
attention dropout off (on CPU it makes students slower). ``each further`` is what one student costs more than
in the row above, in steps of one student.
"""

import sys
import tempfile
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import Report, benchmark_parser, interleaved_medians
from benchmarks.step import (
    LAYERS,
    NO_DROPOUT,
    STUDENT_LAYERS,
    Ours,
    connected,
    make_batch,
    student_config,
    teacher_folder,
)
from configs.schema import Precision, TeacherConfig
from trainer import world
from trainer.world import World


def measure(
    report: Report,
    teacher: TeacherConfig,
    place: World,
    rows: int,
    precision: Precision,
    quick: bool,
    repeats: int,
) -> dict[int, float]:
    """Add a row for every number of students; return what each further one costs."""
    steps = {
        count: Ours(
            teacher,
            [student_config(f"s{number}", overrides=NO_DROPOUT) for number in range(count)],
            place,
            repeat(make_batch(rows, 128)),
            rows,
            rows,
            precision=precision,
        )
        for count in ((1, 2) if quick else (1, 2, 4, 8))
    }
    medians = interleaved_medians({str(count): step for count, step in steps.items()}, repeats)
    alone_s, further, before = medians["1"], {}, 1
    for count, step in steps.items():
        own_s = medians[str(count)]
        if count > 1:
            further[count] = (own_s - medians[str(before)]) / (count - before) / alone_s
        report.add(
            students=count,
            of=precision.value,
            step_s=own_s,
            **{"each further": further.get(count, ""), "against runs apart": count * alone_s / own_s},
            **{part: 1e3 * part_s for part, part_s in step.split().items()},
        )
        before = count
    return further


def main() -> None:
    """Measure and print the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = (512 if arguments.quick else arguments.tokens) // 128
    repeats = 1 if arguments.quick else arguments.repeats
    place, headlines = connected(), []
    report = Report(f"students on one teacher pass, {rows} rows of 128; last columns: milliseconds")
    with tempfile.TemporaryDirectory() as folder:
        teacher_folder(folder, STUDENT_LAYERS if arguments.quick else LAYERS)
        teacher = TeacherConfig(folder, precision=Precision.bf16)
        for precision in (Precision.bf16, Precision.fp32):
            further = measure(report, teacher, place, rows, precision, arguments.quick, repeats)
            shown = ", ".join(f"{share:.0%} up to {count}" for count, share in further.items())
            headlines.append(f"each further {precision.value} student costs {shown}")
    report.finish("; ".join(headlines) + " of a step of one", arguments.json)
    world.disconnect()


if __name__ == "__main__":
    main()
