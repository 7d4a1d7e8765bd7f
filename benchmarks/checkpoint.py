"""What a save costs training: ours in the background and in place, DeepSpeed's own, torch.save.

    python benchmarks/checkpoint.py [--json PATH] [--quick] [--tokens N] [--steps N] [--repeats N]
        [--folder PATH]

BERT-base of random weights teaches a student of 4x312 with a vocabulary of 30522 (14.5 million parameters)
in float32, DeepSpeed at ZeRO 1, one rank. A turn is a save and the steps after it; candidates take turns.

stall_s   from the end of a step until the next can begin
extra_s   by how much the turn is longer than one without a save: with the cores that a writing thread takes
          from the steps, which on a GPU it would not, and the wait for it after the last step
write_s   until everything is on disk
stall %, extra %   their shares of a run that saves every 500 steps

Ours flushes every file to disk and writes the list of checksums; DeepSpeed and torch.save do neither, and
what they write is pickled.
"""

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import count, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import Report, benchmark_parser, interleaved_medians
from benchmarks.step import (
    LAYERS,
    STUDENT_LAYERS,
    Ours,
    connected,
    make_batch,
    student_config,
    teacher_folder,
)
from configs.schema import CheckpointConfig, Precision, TeacherConfig
from trainer import world
from trainer.checkpoint import Checkpoint, Progress, list_complete, load, verify
from trainer.saving import Saved, Writer

EVERY_STEPS = 500
NOTHING, BACKGROUND, IN_PLACE = "no save", "ours, in the background", "ours, in place"
DEEPSPEED, TORCH = "DeepSpeed's own", "torch.save"


class Saves:
    """The ways to save a run, each into a folder of its own, and how long training waited for each."""

    def __init__(self, ours: Ours, folder: Path) -> None:
        self.ours, self.folder = ours, folder
        self.numbers = count(1)
        self.stalls_s: dict[str, list[float]] = defaultdict(list)
        self.writes_s: dict[str, list[float]] = defaultdict(list)
        self.writers = {
            name: Writer(
                folder / name,
                CheckpointConfig(keep_last=1, background=name == BACKGROUND),
                partial(self.written, name),
                patience_s=600.0,
            )
            for name in (BACKGROUND, IN_PLACE)
        }

    def written(self, name: str, saved: Saved) -> None:
        """Keep how long the writing took."""
        assert saved.error is None, saved.error
        self.writes_s[name].append(saved.seconds)

    def by_us(self, name: str) -> None:
        """As the launcher does it."""
        since_s = time.perf_counter()
        states = {trainee.config.name: trainee.engine.state() for trainee in self.ours.run.trainees}
        progress = Progress(step=next(self.numbers))
        self.writers[name].put(Checkpoint(progress, states, {}, "", {}, {}, "", 1), since_s)

    def by_deepspeed(self) -> None:
        """Its own checkpoint, by the engine's own engine."""
        (trainee,) = self.ours.run.trainees
        trainee.engine._engine.save_checkpoint(self.folder / DEEPSPEED, tag="newest")

    def by_torch(self) -> None:
        """State dicts of the model and of AdamW."""
        (trainee,) = self.ours.run.trainees
        (self.folder / TORCH).mkdir(exist_ok=True)
        states = {"model": trainee.engine.module.state_dict(), "adamw": trainee.engine._adamw.state_dict()}
        torch.save(states, self.folder / TORCH / "newest.pt")

    def turn(self, name: str, save: Callable[[], object], steps: int) -> None:
        """Save, and go on for so many steps."""
        started_s = time.perf_counter()
        save()
        self.stalls_s[name].append(time.perf_counter() - started_s)
        for _ in range(steps):
            self.ours()
        if name == BACKGROUND:
            self.writers[name].finish(600.0)


def size(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def in_memory(found: Checkpoint) -> None:
    """Read every number: what ``load`` returns is mapped, and read when it is used."""
    for state in found.students.values():
        for tensor in [*state.weights.values(), *state.moments.values()]:
            tensor.clone()


def main() -> None:
    """Measure and print the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=3, help="after every save")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; else the system's folder for such files")
    arguments = parser.parse_args()
    tokens, steps, repeats = arguments.tokens, arguments.steps, arguments.repeats
    if arguments.quick:
        tokens, steps, repeats = 512, 2, 1
    place = connected()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, rows = Path(name), tokens // 128
        teacher_folder(name, STUDENT_LAYERS if arguments.quick else LAYERS)
        teacher = TeacherConfig(name, precision=Precision.bf16)
        saves = Saves(
            Ours(teacher, [student_config()], place, repeat(make_batch(rows, 128)), rows, rows), folder
        )
        ways: dict[str, Callable[[], object]] = {
            NOTHING: lambda: None,
            BACKGROUND: partial(saves.by_us, BACKGROUND),
            IN_PLACE: partial(saves.by_us, IN_PLACE),
            DEEPSPEED: saves.by_deepspeed,
            TORCH: saves.by_torch,
        }
        turns = {way: partial(saves.turn, way, save, steps) for way, save in ways.items()}
        medians = interleaved_medians(turns, repeats)
        step_s = medians[NOTHING] / steps
        report = Report(f"a save, 4x312 at ZeRO 1; a step of {rows} rows of 128 takes {step_s:.2f} s")
        stalls_s = {way: statistics.median(saves.stalls_s[way][1:]) for way in ways if way != NOTHING}
        for way, stall_s in stalls_s.items():
            extra_s = medians[way] - medians[NOTHING]
            report.add(
                save=way,
                MB=size(folder / way) / 1e6,
                stall_s=stall_s,
                extra_s=extra_s,
                write_s=statistics.median(saves.writes_s.get(way, [stall_s])),
                **{"stall %": share(stall_s, step_s), "extra %": share(extra_s, step_s)},
            )
        (newest,) = list_complete(folder / IN_PLACE)
        reading = interleaved_medians(
            {"verify": lambda: verify(newest), "load": lambda: in_memory(load(newest, verified=True))},
            repeats,
        )
    report.finish(
        f"a save every {EVERY_STEPS} steps holds training up for {share(stalls_s[BACKGROUND], step_s):.3f}% "
        f"of the run in the background ({1e3 * stalls_s[BACKGROUND]:.0f} ms), in place "
        f"{share(stalls_s[IN_PLACE], step_s):.3f}%, by DeepSpeed {share(stalls_s[DEEPSPEED], step_s):.3f}%; "
        f"resuming verifies it in {reading['verify']:.2f} s and loads it in {reading['load']:.2f} s",
        arguments.json,
    )
    world.disconnect()


def share(seconds: float, step_s: float) -> float:
    """Return how many percent of a run it is that saves every ``EVERY_STEPS``."""
    return 100 * seconds / (EVERY_STEPS * step_s + seconds)


if __name__ == "__main__":
    main()
