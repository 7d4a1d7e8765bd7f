"""Faults: each waits for its moment in one start of a run (``benchmarks/tiny_run.py``), then strikes."""

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tiny_run import BATCH_ROWS, Life, TinyRun
from trainer import checkpoint as checkpoints
from trainer import exits

END_LIMIT_S = 45.0  # for all ranks to end once one is gone, or was asked to leave
LAUNCHER_S = 1.0  # while ranks start: until the launcher ends the others once one is gone
DISK_STEPS = 12  # for a save that fails and one that does not


@dataclass
class Fault:
    """One fault and what came of it."""

    kind: str
    struck_s: float = field(default_factory=time.time)
    rows_lost: int = 0
    gone_s: float | None = None  # until all ranks had ended; None: the run goes on
    trained_s: float | None = None  # until the next start had done its first step, if it came so far
    told_by: str = ""  # what the next start must print
    problem: str | None = None


DAMAGES = ["a byte flipped", "a file cut", "a file removed"]

Injector = Callable[[Life, random.Random], Fault | None]
"""Waits for its moment in a life and strikes; None: the run was done before."""


def kill(life: Life, chance: random.Random, aim: str) -> Fault | None:
    """Kill one rank while the run starts, in its steps, or in a save."""
    run = life.run
    if aim == "start":
        there = life.pause(chance.uniform(0.0, run.startup_s))
    else:
        there = life.until(life.training)
    if aim == "step":
        there = there and life.pause(chance.uniform(0.0, 2.0))
    if aim == "save":
        for _ in range(chance.randint(1, 4)):
            there = there and life.until(lambda: not run.saving()) and life.until(run.saving, poll_s=0.001)
        time.sleep(chance.uniform(0.0, 0.02))
    if not there:
        return None
    starting, saving, victim = not life.training(), run.saving(), chance.choice(life.ranks)
    fault = Fault(f"kill -9, {'while starting' if starting else 'in a save' if saving else 'in steps'}")
    victim.kill()
    if victim.wait() != -signal.SIGKILL:
        return None  # it had just ended
    codes = life.wait(LAUNCHER_S if starting else END_LIMIT_S)
    # Killed on its way out, when all was done, it is missed by nobody.
    others = {exits.LOST, exits.DONE} if life.count("finished") else {exits.LOST}
    if not starting and not set(codes) - {-signal.SIGKILL} <= others:
        fault.problem = f"exit codes {codes}"
    return gone(life, fault)


def stop(life: Life, chance: random.Random) -> Fault | None:
    """Ask one rank to leave, or ask twice: all save and end with 75. Who does not listen yet dies of it."""
    if not life.pause(chance.uniform(0.0, life.run.startup_s + 2.0)):
        return None
    signals = chance.choice([["SIGTERM"], ["SIGUSR1"], ["SIGTERM", "SIGTERM"], ["SIGUSR1", "SIGTERM"]])
    starting = not life.training()
    fault = Fault(f"{' + '.join(signals)}, {'while starting' if starting else 'in steps'}")
    for name in signals:
        chance.choice(life.ranks).send_signal(signal.Signals[name])
        life.pause(chance.uniform(0.0, 0.05))
    if starting and not life.pause(0.5):
        codes, allowed = life.wait(LAUNCHER_S), {-signal.SIGTERM, -signal.SIGUSR1, exits.LOST, None}
    else:
        codes, allowed = life.wait(END_LIMIT_S), {exits.STOPPED}
    if set(codes) == {exits.DONE}:
        return None
    gone(life, fault)
    if not set(codes) <= allowed:
        fault.problem = f"exit codes {codes}"
    elif exits.STOPPED in codes and fault.rows_lost:
        fault.problem = f"{fault.rows_lost} rows were not saved"
    return fault


def corrupt(life: Life, chance: random.Random, how: str) -> Fault | None:
    """Kill all ranks after some saves, then damage a file of the newest checkpoint."""
    if not life.until(lambda: life.count("saved") >= 2) or not life.pause(chance.uniform(0.0, 0.5)):
        return None
    fault = Fault(f"newest checkpoint, {how}", told_by="is DAMAGED")
    life.end()
    newest = checkpoints.list_complete(life.run.checkpoints)[-1]
    damage(chance.choice(sorted(path for path in newest.rglob("*") if path.is_file())), how, chance)
    return gone(life, fault)


def damage(path: Path, how: str, chance: random.Random) -> None:
    """Flip one byte of a file, cut it, or remove it."""
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    path.unlink()
    if how == "a byte flipped":
        data[place] ^= 0xFF
        path.write_bytes(data)
    elif how == "a file cut":
        path.write_bytes(data[:place])


def fill_disk(life: Life, chance: random.Random) -> Fault | None:
    """Leave no space for a save, see that it is told and the one before intact, and give the space back."""
    run, filler = life.run, life.run.checkpoints / "filler"
    if not life.until(lambda: life.count("saved") > 0) or not life.pause(chance.uniform(0.0, 0.5)):
        return None
    if life.last_step() > run.steps - DISK_STEPS:
        return None
    fault, failed = Fault("no space for a save"), life.count("save_failed")
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    if not life.until(lambda: life.count("save_failed") > failed):
        fault.problem = "no save failed, or the run ended"
    elif run.newest_step() == 0:
        fault.problem = "the checkpoints before it are damaged"
    filler.unlink()
    saved = life.count("saved")
    if not life.until(lambda: life.count("saved") > saved):
        fault.problem = fault.problem or "nothing was saved any more"
    return fault


def leave(life: Life, chance: random.Random, kind: str) -> Fault | None:
    """End a run after some saves, asked to or killed: the next start is on other ranks."""
    saves = chance.randint(2, 5)
    if not life.until(lambda: life.count("saved") >= saves):
        return None
    fault = Fault(kind)
    if chance.random() < 0.5:
        life.ranks[0].terminate()
        if set(life.wait(END_LIMIT_S)) != {exits.STOPPED}:
            fault.problem = "it did not leave when asked to"
    return gone(life, fault)


def gone(life: Life, fault: Fault) -> Fault:
    """Note what a fault that ended a life cost."""
    fault.gone_s = time.time() - fault.struck_s
    life.end()
    fault.rows_lost = BATCH_ROWS * max(0, life.last_step() - life.run.newest_step())
    return fault


def campaign(
    run: TinyRun, injectors: list[Injector], chance: random.Random, worlds: Iterable[tuple[int, int]]
) -> list[Fault]:
    """Start a run until it is done, and return the faults that it met; injectors that struck are popped.

    ``worlds`` are number of ranks and ZeRO stage, start by start.
    """
    faults: list[Fault] = []
    for ranks, stage in worlds:
        expected, life = run.newest_step(), run.start(ranks, stage)
        struck: list[Fault] = []
        try:
            while injectors and (not struck or struck[-1].gone_s is None):
                fault = injectors[0](life, chance)
                if fault is None:
                    break
                struck.append(fault)
                injectors.pop(0)
            lives_on = not struck or struck[-1].gone_s is None
            codes = life.wait(300.0) if lives_on else []
        finally:
            life.end()
        if faults and faults[-1].gone_s is not None:
            judge(faults[-1], life.events(), life.said(), expected)
            if faults[-1].problem is not None:
                tell(faults[-1], life)
        faults += struck
        for fault in struck:
            tell(fault, life)
        if lives_on:
            if set(codes) != {exits.DONE}:
                faults.append(Fault("none: it ended by itself", problem=f"exit codes {codes}"))
                tell(faults[-1], life)
            break
    return faults


def judge(fault: Fault, events: Sequence[dict[str, Any]], log: str, expected: int) -> None:
    """Look at the start after a fault: from the newest intact checkpoint, told loudly, trained again."""
    first = {event["event"]: event for event in reversed(events)}
    if "training" in first:
        fault.trained_s = first["training"]["at_s"] - fault.struck_s
    if "started" not in first:
        return  # ended while starting, by the next fault
    if first["started"]["step"] != expected:
        fault.problem = f"went on from step {first['started']['step']}, newest intact: {expected}"
    elif fault.told_by not in log:
        fault.problem = f"the next start does not say {fault.told_by}"


def tell(fault: Fault, life: Life) -> None:
    """Print one line, and what the ranks said where something is wrong."""
    after = "" if fault.gone_s is None else f", all gone after {fault.gone_s:.1f} s"
    print(
        f"start {life.run.starts} of {life.run.output.name}: {fault.kind}, step {life.last_step()}{after}",
        flush=True,
    )
    if fault.problem is not None:
        print(f"{life.tail()}\nNOT SURVIVED: {fault.problem}", flush=True)
