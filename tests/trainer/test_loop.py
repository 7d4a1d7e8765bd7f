"""The loop with a real engine on one rank: when it tells what, how far it reads, what it refuses."""

import copy
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.deepspeed import derive
from configs.load import load_config
from configs.schema import RunConfig
from sharding.corpora import Corpora, open_corpora
from sharding.manifest import open_corpus
from tests.trainer.tiny import tiny_encoder
from trainer import engine
from trainer.capture import capture, enable_capture
from trainer.checkpoint import Checkpoint, Progress
from trainer.clock import Clock
from trainer.engine import EngineState
from trainer.interruption import Interruption
from trainer.loop import NonFiniteError, Run, Trainee, total_steps, train
from trainer.meter import SpeedMeter
from trainer.models import build_student
from trainer.rollback import roll_back
from trainer.schedule import lr_multiplier
from trainer.shapes import transfer
from trainer.world import World

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory):
    """A process group of one rank; DeepSpeed remembers its first one, so all tests here share it."""
    meet = tmp_path_factory.mktemp("group") / "meet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
        engine.attach()
        yield
        dist.destroy_process_group()


def configured(tiny_corpus: Path, *overrides: str) -> RunConfig:
    return load_config(
        RunConfig,
        None,
        [
            "name=loop",
            "output=unused",
            "teacher.model=unused",
            f"data.corpus={tiny_corpus}",
            "data.workers=0",
            "students=[{name: s, layers: 2, hidden_size: 24, heads: 4, intermediate_size: 48}]",
            "students.0.optimizer.lr=0.01",
            "train.global_batch_rows=8",
            "train.micro_batch_rows=4",
            "train.steps=7",
            "log.every_steps=2",
            "evaluation.every_steps=3",
            "evaluation.rows=8",
            "checkpoint.every_steps=5",
            *overrides,
        ],
    )


def make_run(
    config: RunConfig, progress: Progress, place: World = ALONE, states: Mapping[str, EngineState] = {}
) -> Run:
    """A run of every student in the config; ``states`` are what a checkpoint holds of them."""
    teacher = tiny_encoder("bert").eval()
    enable_capture(teacher)
    trainees = []
    for student in config.students:
        module = build_student(student, lambda head: teacher, teacher.config, config.train.seed)
        own = engine.Engine(module, student.optimizer, derive(config, student, place.size, False), place)
        if student.name in states:
            own.load(states[student.name])
        own.train()
        trainees.append(Trainee(student, transfer(student, teacher.config), own))
    corpora = open_corpora(config.data)

    @torch.no_grad()
    def teach(inputs):
        return capture(teacher, inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS)

    return Run(
        config=config,
        world=place,
        corpora=corpora,
        teach=teach,
        teacher_hidden_size=48,
        trainees=trainees,
        speed=SpeedMeter(1.0, 1.0, Clock(place.device)),
        progress=progress,
        total_steps=total_steps(config, corpora),
    )


class Heard:
    """Keeps what the loop tells."""

    def __init__(self) -> None:
        self.logs, self.evaluations, self.saves, self.retirements = [], [], [], []
        self.firsts, self.rollbacks = [], []

    def logged(self, progress, speed, students):
        self.logs.append((progress.step, progress.rows, speed, students))

    def evaluated(self, progress, students):
        self.evaluations.append((progress.step, students))

    def retired(self, name, reason):
        self.retirements.append((name, reason))

    def save(self, progress):
        self.saves.append((progress.step, progress.rows))

    def training(self, progress):
        self.firsts.append(progress.step)

    def roll_back(self, name, reason):
        self.rollbacks.append((name, reason))


def test_everything_is_told_when_due_and_at_the_end(group, tiny_corpus):
    config, heard = configured(tiny_corpus), Heard()
    run = make_run(config, Progress())
    train(run, heard)
    assert [(step, rows) for step, rows, *_ in heard.logs] == [(2, 16), (4, 32), (6, 48), (7, 56)]
    assert [step for step, _ in heard.evaluations] == [0, 3, 6, 7]
    assert heard.saves == [(5, 40), (7, 56)] and heard.firsts == [1]
    assert heard.evaluations[-1][1]["s"]["total"] < heard.evaluations[0][1]["s"]["total"]
    assert replace(run.progress, tokens=0) == Progress(step=7, rows=56)
    for step, _, speed, students in heard.logs:
        losses = students["s"]
        assert losses["optimizer/lr"] == 0.01 * lr_multiplier(step - 1, 7, 0.1, "linear", 0.0)
        terms = [value for key, value in losses.items() if key.startswith("loss/") and key != "loss/total"]
        assert losses["loss/total"] == pytest.approx(sum(terms))
        assert speed["progress/rows"] == step * 8
    assert heard.logs[-1][2]["time/eta_s"] == 0


def test_a_run_that_resumes_starts_where_it_stood(group, tiny_corpus):
    heard = Heard()
    run = make_run(configured(tiny_corpus), Progress(step=5, rows=40))
    train(run, heard)
    assert [(step, rows) for step, rows, *_ in heard.logs] == [(6, 48), (7, 56)]
    assert [step for step, _ in heard.evaluations] == [6, 7], "step 0 is behind"
    assert heard.saves == [(7, 56)]


def test_asked_to_leave_it_finishes_the_step_saves_and_says_why(group, tiny_corpus):
    run, heard = make_run(configured(tiny_corpus), Progress()), Heard()
    run.interruption, plain = Interruption(rank=3), run.teach

    def teach(inputs):
        if run.progress.step == 2:
            run.interruption._note(signal.SIGTERM, None)
        return plain(inputs)

    run.teach = teach
    reason = train(run, heard)
    assert reason is not None and reason.startswith("SIGTERM at rank 3 (")
    # It came after the ranks had agreed about the third step, so the fourth is the last one.
    assert replace(run.progress, tokens=0) == Progress(step=4, rows=32) and heard.saves == [(4, 32)]
    assert train(run, heard) == reason and heard.saves[-1] == (5, 40), "it stands until the process ends"


def test_asked_to_leave_in_the_last_step_it_is_simply_done(group, tiny_corpus):
    run = make_run(configured(tiny_corpus), Progress(step=6, rows=48))
    run.interruption = Interruption(max_hours=1.0, started_s=time.monotonic() - 3601)
    assert train(run, Heard()) is None and run.progress.step == 7


class Restoring(Heard):
    """Keeps states and goes back to the newest, as a run does with its checkpoints."""

    def __init__(self, run):
        super().__init__()
        self.run, self.kept = run, None

    def save(self, progress):
        super().save(progress)
        own = {trainee.config.name: trainee.engine.state() for trainee in self.run.trainees}
        skipped = {trainee.config.name: trainee.skipped_steps for trainee in self.run.trainees}
        self.kept = Checkpoint(copy.deepcopy(progress), own, skipped, "", {}, {}, "", 1)

    def roll_back(self, name, reason):
        super().roll_back(name, reason)
        roll_back(self.run, self.kept, name)


@pytest.mark.parametrize("failing_step", [1, 4])
def test_a_rollback_takes_all_back_and_lowers_the_rate_of_the_one_that_failed(
    group, tiny_corpus, failing_step
):
    """b computes NaN once, when a has made the step already; a must end as if nothing had been."""
    rates = [f"students.{number}.optimizer.lr=0.01" for number in (0, 1)]
    settings = [*rates, "train.non_finite=rollback", "checkpoint.every_steps=2"]
    alone, run = (make_run(configured(tiny_corpus, TWO, *settings), Progress()) for _ in range(2))
    train(alone, Restoring(alone))
    calls = []

    def fail_once(module, inputs, output):
        if module.training and run.progress.step + 1 == failing_step and not calls:
            calls.append(failing_step)
            return output * float("nan")
        return output

    run.trainees[1].engine.module.encoder.embeddings.register_forward_hook(fail_once)
    heard = Restoring(run)
    assert train(run, heard) is None
    ((name, reason),) = heard.rollbacks
    assert name == "b" and f"step {failing_step} " in reason and heard.retirements == []
    assert replace(run.progress, tokens=0) == Progress(7, 56, rollbacks={"b": 1}, lr_scale={"b": 0.5})
    after, expected = (each.trainees[0].engine.state() for each in (run, alone))
    assert all(torch.equal(after.weights[key], expected.weights[key]) for key in expected.weights)
    assert all(torch.equal(after.moments[key], expected.moments[key]) for key in expected.moments)
    last = heard.logs[-1][3]
    assert (
        last["b"]["optimizer/lr"] == last["a"]["optimizer/lr"] / 2 and last["b"]["optimizer/rollbacks"] == 1
    )
    assert all(speed["share/other"] >= 0 for _, _, speed, _ in heard.logs), (
        "steps gone back over count in none"
    )
    again = [step for step, *_ in heard.logs]
    assert again == [2, 4, 6, 7], "what was being measured when it failed is measured anew"


def test_rollbacks_are_bounded(group, tiny_corpus):
    settings = ["train.non_finite=rollback", "train.max_rollbacks=2"]
    run = make_run(configured(tiny_corpus, TWO, *settings), Progress())
    poison(run.trainees[1])
    heard = Restoring(run)
    train(run, heard)
    ((name, reason),) = heard.retirements
    assert name == "b" and reason.endswith("; it was rolled back 2 times")
    assert run.progress.lr_scale == {"b": 0.25} and run.progress.step == 7


def test_a_run_that_is_done_does_nothing(group, tiny_corpus):
    heard = Heard()
    train(make_run(configured(tiny_corpus), Progress(step=7, rows=56)), heard)
    assert (heard.logs, heard.evaluations, heard.saves) == ([], [], [])


def test_a_step_that_is_not_finite_is_skipped_and_counted(group, tiny_corpus):
    """The teacher says infinity for one whole step; the student keeps its weights and goes on."""
    run, heard = make_run(configured(tiny_corpus, "train.non_finite=skip"), Progress()), Heard()
    plain, calls = run.teach, []

    def faulty(inputs):
        targets = plain(inputs)
        calls.append(None)
        if run.progress.step == 3:
            targets.hidden[4] = targets.hidden[4] * float("inf")
        return targets

    run.teach = faulty
    train(run, heard)
    assert replace(run.progress, tokens=0) == Progress(step=7, rows=56)
    assert run.trainees[0].skipped_steps == 1 and run.trainees[0].skipped_in_a_row == 0
    assert heard.logs[-1][3]["s"]["optimizer/skipped_steps"] == 1
    assert heard.evaluations[-1][1]["s"]["total"] < heard.evaluations[0][1]["s"]["total"]
    assert all(torch.isfinite(value).all() for value in run.trainees[0].engine.weights().values())


def test_by_default_it_stops(group, tiny_corpus):
    run = make_run(configured(tiny_corpus), Progress())
    plain = run.teach

    def faulty(inputs):
        targets = plain(inputs)
        targets.hidden[0] = targets.hidden[0] * float("nan")
        return targets

    run.teach = faulty
    before = run.trainees[0].engine.weights()
    with pytest.raises(NonFiniteError, match="student s: the loss or gradient of step 1 .*non_finite=skip"):
        train(run, Heard())
    after = run.trainees[0].engine.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


TWO = (
    "students=[{name: a, layers: 2, hidden_size: 24, heads: 4, intermediate_size: 48},"
    " {name: b, layers: 1, hidden_size: 24, heads: 4, intermediate_size: 48}]"
)


def poison(trainee: Trainee) -> None:
    """From now on nothing that this student computes is finite."""
    trainee.engine.module.encoder.embeddings.register_forward_hook(lambda *args: args[2] * float("nan"))


@pytest.mark.parametrize(("policy", "at"), [("stop", 3), ("skip", 5)])
def test_a_student_that_fails_is_retired_by_the_policy(group, tiny_corpus, policy, at):
    settings = ["students.0.optimizer.lr=0.01", f"train.non_finite={policy}", "train.max_skipped_steps=3"]
    run, heard = make_run(configured(tiny_corpus, TWO, *settings), Progress()), Heard()
    plain = run.teach

    def teach(inputs):
        if run.progress.step == 2 and not calls:
            calls.append(poison(run.trainees[1]))
        return plain(inputs)

    calls, run.teach = [], teach
    train(run, heard)
    ((name, reason),) = heard.retirements
    assert name == "b" and run.progress.retired == {"b": reason}
    assert f"step {at} (rows from {8 * (at - 1)}) is not finite, {at - 2} steps in a row" in reason
    assert run.progress.step == 7 and run.trainees[1].skipped_steps == at - 2
    assert [set(students) for *_, students in heard.logs] == [
        {"a", "b"} if step < at else {"a"} for step in (2, 4, 6, 7)
    ]
    assert [set(students) for _, students in heard.evaluations] == [
        {"a", "b"} if step < at else {"a"} for step in (0, 3, 6, 7)
    ]


def test_when_the_last_student_fails_the_run_ends(group, tiny_corpus):
    run, heard = make_run(configured(tiny_corpus, TWO), Progress()), Heard()
    for trainee in run.trainees:
        poison(trainee)
    with pytest.raises(NonFiniteError, match="student b: the loss or gradient of step 1 "):
        train(run, heard)
    assert [name for name, _ in heard.retirements] == ["a"] and run.progress.step == 0


def test_the_parts_of_a_step_are_timed_for_the_run_and_for_each_student(group, tiny_corpus):
    heard = Heard()
    train(make_run(configured(tiny_corpus, TWO, "evaluation.every_steps=null"), Progress()), heard)
    parts = ["data", "teacher", "forward", "losses", "backward", "optimizer", "other"]
    for _, _, speed, students in heard.logs:
        assert sum(speed[f"share/{part}"] for part in parts) == pytest.approx(1)
        assert sum(speed[f"time/{part}_s"] for part in parts) == pytest.approx(speed["speed/step_s"])
        assert all(speed[f"share/{part}"] > 0 for part in parts)
        for part in ("forward", "losses", "backward", "optimizer"):
            own_s = [students[name][f"time/{part}_s"] for name in ("a", "b")]
            assert sum(own_s) == pytest.approx(speed[f"time/{part}_s"]) and min(own_s) > 0


@pytest.mark.parametrize(("epochs", "steps"), [("1", 81), ("0.5", 40), ("2.5", 202), ("0.001", 1)])
def test_epochs_become_steps(tiny_corpus, epochs, steps):
    """646 rows are 80.75 steps of 8."""
    corpora = Corpora.of(open_corpus(tiny_corpus))
    assert corpora.rows("train") == 646
    config = configured(tiny_corpus, "train.steps=null", f"train.epochs={epochs}")
    assert total_steps(config, corpora) == steps
