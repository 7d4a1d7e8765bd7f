"""Going back: one student, or a whole run, to what a checkpoint holds, in the engines that are there."""

from dataclasses import replace

from trainer.checkpoint import Checkpoint
from trainer.loop import Run, Trainee
from trainer.meter import CorpusMeter, LossMeter


def restore(trainee: Trainee, checkpoint: Checkpoint) -> None:
    """Take one student back to a checkpoint (collective)."""
    trainee.engine.load(checkpoint.students[trainee.config.name])
    trainee.skipped_steps = checkpoint.skipped_steps[trainee.config.name]
    trainee.skipped_in_a_row = 0


def roll_back(run: Run, checkpoint: Checkpoint, failed: str) -> None:
    """Take all students back to a checkpoint and lower the rate of the one that failed (collective)."""
    factor, before = run.config.train.rollback_lr_factor, run.progress
    for trainee in run.trainees:
        restore(trainee, checkpoint)
        trainee.losses = LossMeter()
        if trainee.by_corpus is not None:
            trainee.by_corpus = CorpusMeter(
                trainee.by_corpus.names, trainee.transfer, run.teacher_hidden_size
            )
    run.speed.forget()
    run.progress = replace(
        checkpoint.progress,
        rollbacks=before.rollbacks | {failed: before.rollbacks.get(failed, 0) + 1},
        lr_scale=before.lr_scale | {failed: before.lr_scale.get(failed, 1.0) * factor},
    )
