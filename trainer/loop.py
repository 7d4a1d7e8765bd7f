"""The loop: one pass of the teacher per micro batch, every student learning from it.

Dropout is a pure function of where the run stands: before each student's forward pass the generator is
seeded from (seed, step, rank, micro batch). So a resumed run draws what the uninterrupted one drew, and a
student draws the same beside others as alone.

A student whose loss or gradient is not finite fails alone: it is *retired*, and the others go on bitwise as
if it had never been there. Ranks agree on it, because the gradient norm is global. An exception on one rank
(out of memory, a lost device) cannot be kept to one student: the other ranks wait for that rank in the
collectives of the student's backward pass and step, and nothing could call them off. It ends the run, as a
lost rank does.

A *rollback* takes all students back to the newest checkpoint, since they share the rows. Those that had not
failed repeat bitwise what they did.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch

from configs.deepspeed import micro_batches
from configs.schema import Damaged, NonFinite, Precision, RunConfig
from configs.student_schema import StudentConfig
from sharding.corpora import Corpora
from sharding.stream import Batch, stream
from trainer.checkpoint import Progress
from trainer.columns import Columns
from trainer.engine import Engine, StepResult
from trainer.evaluation import Encode, evaluate
from trainer.interruption import Interruption
from trainer.layout import Counts, row_counts
from trainer.meter import CorpusMeter, LossMeter, SpeedMeter
from trainer.models import Inputs
from trainer.probes import ProbeTask, hidden_of_student, hidden_of_teacher, probe_tasks
from trainer.profile import Profile
from trainer.quarantine import mask_damaged
from trainer.schedule import lr_multiplier
from trainer.transfer import Transfer, denominators, total, weights
from trainer.world import World, gather_over_ranks, sum_over_ranks


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite, the policy says stop, and no other student can go on."""


class _Rollback(Exception):
    """A student failed and the policy is to go back to the newest checkpoint; on all ranks alike."""

    def __init__(self, student: str, reason: str) -> None:
        self.student, self.reason = student, reason


@dataclass
class Trainee:
    """One student in training."""

    config: StudentConfig
    transfer: Transfer
    engine: Engine
    losses: LossMeter = field(default_factory=LossMeter)
    by_corpus: CorpusMeter | None = None  # of a run on several corpora
    result: StepResult = StepResult(0.0, applied=True)  # of the last step
    skipped_steps: int = 0  # over the whole run
    skipped_in_a_row: int = 0


class Listener(Protocol):
    """What the loop tells the outside; every method is called on all ranks, with equal values."""

    def logged(
        self, progress: Progress, speed: Mapping[str, float], students: Mapping[str, dict[str, float]]
    ) -> None:
        """Losses and rates of every active student over the last span, by name, and the run's speed."""

    def evaluated(self, progress: Progress, students: Mapping[str, dict[str, float]]) -> None:
        """Held-out losses of every active student, by name."""

    def probed(
        self, progress: Progress, teacher: Mapping[str, float], students: Mapping[str, dict[str, float]]
    ) -> None:
        """Probes' scores, by task and metric: the teacher's, once, and those of every active student."""

    def retired(self, name: str, reason: str) -> None:
        """A student has failed; the others go on."""

    def save(self, progress: Progress) -> None:
        """A checkpoint is due (collective)."""

    def roll_back(self, name: str, reason: str) -> None:
        """A student has failed: restore engines and progress from the newest checkpoint (collective)."""

    def training(self, progress: Progress) -> None:
        """The first step of this process is done."""


@dataclass
class Run:
    """Everything that the loop works with."""

    config: RunConfig
    world: World
    corpora: Corpora
    teach: Encode
    teacher_hidden_size: int
    trainees: list[Trainee]
    speed: SpeedMeter
    progress: Progress
    total_steps: int
    separator: int | None = None
    """Id of the token that ends a document, where a row's documents are kept apart."""
    columns: Mapping[str, Columns] = field(default_factory=lambda: defaultdict(Columns))
    """By split: labels and the teacher's logits of a task's rows."""
    trim: bool = False
    """Cut off what is padding in all rows of a micro batch."""
    teacher_score: Mapping[str, float] = field(default_factory=dict)
    """A task teacher's own metrics on held-out rows."""
    probes: list[ProbeTask] = field(default_factory=list)
    profile: Profile | None = None
    interruption: Interruption = field(default_factory=Interruption)
    beat: Callable[[str], object] = lambda place: None
    """Told what comes next, whenever the loop gets further: a watchdog's."""

    @property
    def active(self) -> list[Trainee]:
        """The students that train: all that are not retired."""
        return [trainee for trainee in self.trainees if trainee.config.name not in self.progress.retired]


def total_steps(config: RunConfig, corpora: Corpora) -> int:
    """Return the run's length in optimizer steps; a share of an epoch is rounded to the nearest step.

    An epoch of several corpora is as many rows as they hold together.
    """
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None, "check_run comes first"
    return max(1, round(config.train.epochs * corpora.rows("train") / config.train.global_batch_rows))


def train(run: Run, listener: Listener) -> str | None:
    """Train all students to the run's last step (collective); return why it was left early, None when done.

    Raises:
        NonFiniteError: by the policy ``train.non_finite``, when the last active student fails.
        CorpusError: a damaged shard.
    """
    if run.progress.step == 0 and run.config.train.non_finite is NonFinite.rollback:
        listener.save(run.progress)  # there is always one to go back to
    while True:
        try:
            return _train(run, listener)
        except _Rollback as failure:
            listener.roll_back(failure.student, failure.reason)


def _train(run: Run, listener: Listener) -> str | None:
    progress, config, end, clock = run.progress, run.config, run.total_steps, run.speed.clock
    first = progress.step + 1
    if progress.step == 0 and config.evaluation.every_steps is not None:
        _evaluate(run, listener)
    if progress.step == 0 and run.probes:
        _probe(run, listener)
    run.beat(f"the rows of step {first}")
    for batch in run.speed.timed(_batches(run)):
        run.beat(f"step {progress.step + 1}")
        if config.data.damaged is Damaged.quarantine:
            batch = mask_damaged(batch, progress, run.world)
        tokens, leaving = accumulate_gradients(run, batch)
        for trainee in run.active:
            with clock.part(f"{trainee.config.name}/optimizer"):
                trainee.result = trainee.engine.step(_rate(run, trainee, progress.step))
        _handle_non_finite(run, listener)
        progress.step += 1
        progress.rows = batch.position
        progress.tokens += tokens
        run.speed.add(config.train.global_batch_rows, tokens)
        if progress.step == first:
            listener.training(progress)
        if run.profile is not None:
            run.profile.step()
        if _due(config.log.every_steps, progress.step, end):
            _log(run, listener)
        if _due(config.evaluation.every_steps, progress.step, end):
            _evaluate(run, listener)
        if _due(config.probes.every_steps, progress.step, end):
            _probe(run, listener)
        if _due(config.checkpoint.every_steps, progress.step, end) or progress.step == end or leaving:
            run.beat(f"saving step {progress.step}")
            listener.save(progress)
        if leaving and progress.step < end:
            return "; ".join(reason for reason in gather_over_ranks(run.interruption.reason) if reason)
        run.beat(f"the rows of step {progress.step + 1}")
    return None


def accumulate_gradients(run: Run, batch: Batch) -> tuple[int, bool]:
    """Run the teacher and every student over one global step's rows (collective).

    Returns the step's number of valid tokens, and whether some rank has been asked to leave after it.

    Every loss is divided by the counts of the whole global step, which are known before the first micro
    batch: so neither ranks, nor micro batches, nor padding change loss or gradient.
    """
    device, clock, rows_of_rank = run.world.device, run.speed.clock, len(batch.length_B)
    micros = micro_batches(run.config.train, run.world.size)
    counts_B3 = row_counts(batch.ids_BS, batch.length_B, run.separator)
    asked = torch.tensor([run.interruption.reason is not None])
    *counted_all, leaving = sum_over_ranks(torch.cat([counts_B3.sum(dim=0), asked]).to(device)).tolist()
    counts = Counts(*counted_all).positive()
    for micro in range(micros):
        rows = slice(rows_of_rank * micro // micros, rows_of_rank * (micro + 1) // micros)
        inputs = Inputs.of(batch, rows, device, run.separator, run.columns["train"], run.trim)
        with clock.part("teacher"):
            targets = run.teach(inputs)
        for trainee in run.active:
            name = trainee.config.name
            _seed_dropout(run.config.train.seed, run.progress.step, run.world.rank, micro)
            with clock.part(f"{name}/forward"):
                learned = trainee.engine(inputs)
            with clock.part(f"{name}/losses"):
                sums = inputs.distil(learned, targets, trainee.transfer)
                counted = denominators(trainee.transfer, counts, run.teacher_hidden_size)
                loss = total(sums, counted, weights(trainee.transfer))
            with clock.part(f"{name}/backward"):
                trainee.engine.backward(loss)
            trainee.losses.add(sums, counted)
            if trainee.by_corpus is not None:
                trainee.by_corpus.add(sums, batch.corpus_B[rows].to(device), counts_B3[rows].to(device))
    return int(counts.tokens), bool(leaving)


def _handle_non_finite(run: Run, listener: Listener) -> None:
    """Apply ``train.non_finite`` to students whose gradient norm was not finite; all ranks see the same.

    A loss that is not finite has a gradient that is not finite. In fp16 a step now and then is left out to
    find the loss scale: that is no failure, and only ``max_skipped_steps`` in a row are one. A student that
    fails is rolled back, or retired; the last active one ends the run.
    """
    train = run.config.train
    skip = train.non_finite is NonFinite.skip or run.config.deepspeed.precision is Precision.fp16
    for trainee in run.active:
        if trainee.result.applied:
            trainee.skipped_in_a_row = 0
            continue
        trainee.skipped_steps += 1
        trainee.skipped_in_a_row += 1
        if skip and trainee.skipped_in_a_row < train.max_skipped_steps:
            continue
        name = trainee.config.name
        reason = (
            f"the loss or gradient of step {run.progress.step + 1} (rows from {run.progress.rows}) is not "
            f"finite, {trainee.skipped_in_a_row} steps in a row; the weights are as before"
        )
        rollbacks = run.progress.rollbacks.get(name, 0)
        if train.non_finite is NonFinite.rollback and rollbacks < train.max_rollbacks:
            raise _Rollback(name, reason)
        if rollbacks:
            reason += f"; it was rolled back {rollbacks} times"
        if len(run.active) == 1:
            raise NonFiniteError(
                f"student {name}: {reason}. Lower students.N.optimizer.lr, set max_grad_norm, leave such "
                "steps out with train.non_finite=skip, or go back and on at a lower rate with =rollback; "
                "started again, the run resumes from its newest checkpoint"
            )
        run.progress.retired[name] = reason
        listener.retired(name, reason)


def _log(run: Run, listener: Listener) -> None:
    steps = run.speed.steps
    rows_left = (run.total_steps - run.progress.step) * run.config.train.global_batch_rows
    speed = run.speed.report(rows_left, run.world)
    students = {}
    for trainee in run.active:
        losses = trainee.losses.means(weights(trainee.transfer), steps)
        if trainee.by_corpus is not None:
            means = trainee.by_corpus.means(run.world.device)
            losses |= {key: value for key, value in means.items() if key.startswith("corpus/")}
        students[trainee.config.name] = {
            **{f"loss/{key}": value for key, value in losses.items()},
            **(run.speed.of_student(trainee.config.name) if len(run.trainees) > 1 else {}),
            "optimizer/lr": _rate(run, trainee, run.progress.step - 1),
            "optimizer/grad_norm": trainee.result.grad_norm,
            "optimizer/skipped_steps": trainee.skipped_steps,
            "optimizer/rollbacks": run.progress.rollbacks.get(trainee.config.name, 0),
        }
    listener.logged(run.progress, {**speed, **_position(run)}, students)


def _position(run: Run) -> dict[str, float]:
    """How far the run has come, over all its rows and in each of several corpora."""
    rows, parts = run.progress.rows, run.corpora.parts
    found: dict[str, float] = {"progress/rows": rows, "progress/tokens": run.progress.tokens}
    found["progress/epoch"] = rows / run.corpora.rows("train")
    if len(parts) > 1:
        consumed = run.corpora.mixture(run.config.train.global_batch_rows).consumed(rows).tolist()
        for part, own in zip(parts, consumed, strict=True):
            found[f"progress/epoch/{part.name}"] = own / part.corpus.split("train").rows
    if run.config.data.damaged is Damaged.quarantine:
        found["data/quarantined_blocks"] = len(run.progress.quarantined)
    return found


def _evaluate(run: Run, listener: Listener) -> None:
    active = run.active
    for trainee in active:
        trainee.engine.train(False)
    losses = evaluate(
        run.teach,
        [(trainee.engine, trainee.transfer) for trainee in active],
        run.teacher_hidden_size,
        run.corpora,
        run.config.evaluation.rows,
        run.config.train.micro_batch_rows,
        run.world,
        mask_damaged=run.config.data.damaged is Damaged.quarantine,
        separator=run.separator,
        columns=run.columns["heldout"],
        trim=run.trim,
        beat=lambda: run.beat(f"evaluation after step {run.progress.step}"),
    )
    for trainee in active:
        trainee.engine.train(True)
    names = [trainee.config.name for trainee in active]
    listener.evaluated(run.progress, dict(zip(names, losses, strict=True)))


def _probe(run: Run, listener: Listener) -> None:
    probe = partial(
        probe_tasks,
        run.probes,
        micro_batch_rows=run.config.train.micro_batch_rows,
        world=run.world,
        beat=lambda: run.beat(f"probes after step {run.progress.step}"),
    )
    teacher = {}
    if run.progress.step == 0:
        teacher = probe(hidden_of_teacher(run.config.teacher, run.world))
    students = {}
    for trainee in run.active:
        with hidden_of_student(trainee.engine) as hidden:
            students[trainee.config.name] = probe(hidden)
    listener.probed(run.progress, teacher, students)


def _batches(run: Run) -> Iterable[Batch]:
    train, data = run.config.train, run.config.data
    steps_left = run.total_steps - run.progress.step
    return stream(
        run.corpora,
        "train",
        seed=train.seed,
        group_blocks=data.group_blocks,
        start_row=run.progress.rows,
        stop_row=run.progress.rows + steps_left * train.global_batch_rows,
        global_batch_rows=train.global_batch_rows,
        rank=run.world.rank,
        world_size=run.world.size,
        workers=data.workers,
        prefetch_steps=data.prefetch_steps,
        prefetch_blocks=data.prefetch_blocks,
        node_cache=run.corpora.node_cache,
        pin_memory=run.world.device.type == "cuda",
        quarantined=run.progress.quarantined if data.damaged is Damaged.quarantine else None,
    )


def _rate(run: Run, trainee: Trainee, step: int) -> float:
    """The learning rate of the update after ``step`` completed steps."""
    optimizer = trainee.config.optimizer
    decay = optimizer.decay.value
    multiplier = lr_multiplier(step, run.total_steps, optimizer.warmup, decay, optimizer.min_lr_ratio)
    return optimizer.lr * multiplier * run.progress.lr_scale.get(trainee.config.name, 1.0)


def _due(every_steps: int | None, step: int, last_step: int) -> bool:
    """True after every so many steps, and after the last one."""
    return every_steps is not None and (step % every_steps == 0 or step == last_step)


def _seed_dropout(seed: int, step: int, rank: int, micro: int) -> None:
    mixed = np.random.SeedSequence([seed, step, rank, micro]).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))
