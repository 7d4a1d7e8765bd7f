"""A few steps under torch's profiler: a trace file per rank, and a short table of where the time went."""

from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from trainer.meter import SpeedMeter
from trainer.world import World

WAIT, WARM_UP = 1, 1  # steps left out: the first allocates, the next has the profiler's own start in it
TOP = 12  # operations in the table
COMMUNICATION = ("gloo:", "ncclDevKernel")  # operations on CPU, kernels on CUDA


class Profile:
    """Profiles ``steps`` steps of a run after the first two, writes what it saw, and lets the run go on.

    The trace, ``rank<N>.trace.json.gz`` in ``folder``, opens in Perfetto or chrome://tracing; a step's parts
    are ranges in it under the names that ``SpeedMeter`` has for them.

    Communication is read off the profiler, as the time that gloo's operations or NCCL's kernels took, waiting
    for other ranks included. It lies inside the other parts, and beside computation where it overlaps.
    (DeepSpeed 0.19.8 has a log of its own collectives. It is not used: every entry holds all earlier ones as
    well, and of an asynchronous operation it times the start only.)
    """

    def __init__(
        self, folder: Path, world: World, speed: SpeedMeter, steps: int, tell: Callable[[str], None]
    ) -> None:
        """Args: ``tell`` is given the table."""
        self._path = folder / f"rank{world.rank}.trace.json.gz"
        self._world, self._speed, self._tell = world, speed, tell
        self._steps = 0  # since the start
        self._last = WAIT + WARM_UP + steps
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=steps, repeat=1),
            on_trace_ready=self._finish,
        )
        self._profiler.start()

    def step(self) -> None:
        """Close a step; the last one of the profile writes it."""
        self._steps += 1
        if self._steps > self._last:
            return
        if self._steps == WAIT + WARM_UP:
            self._before_s = self._speed.seconds()
        self._profiler.step()

    def close(self) -> None:
        """Write what there is when the run ends before the profile does."""
        if self._steps < self._last:
            self._profiler.stop()

    def _finish(self, profiler: profile) -> None:
        after_s, steps = self._speed.seconds(), self._steps - WAIT - WARM_UP
        if steps < 1:
            return
        split_s = {part: (after_s[part] - self._before_s.get(part, 0.0)) / steps for part in after_s}
        partial = self._path.with_name(f".{self._path.name}")  # its suffix says that it is compressed
        where = f"trace in {self._path}"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            partial.rename(self._path)
        except OSError as error:
            where = f"whose trace could not be written: {error}"
        self._tell(f"profile of {steps} steps, {where}\n{self._table(profiler, steps, split_s)}")

    def _table(self, profiler: profile, steps: int, split_s: dict[str, float]) -> str:
        on_device = self._world.device.type == "cuda"
        # From the events themselves: in the averages an operation that ends on another thread lasts no time.
        communication = (e for e in profiler.events() if e.name.startswith(COMMUNICATION))
        communication_s = sum(event.time_range.elapsed_us() for event in communication) / 1e6 / steps
        taken_s = {}
        for event in profiler.key_averages():
            own_us = event.self_device_time_total if on_device else event.self_cpu_time_total
            if not event.is_user_annotation:
                taken_s[event.key] = own_us / 1e6 / steps, event.count / steps
        step_s = split_s.pop("step")
        split_s["other"] = step_s - sum(split_s.values())
        lines = [f"{'part of the step':50} {'calls':>9} {'ms':>9} {'share':>6}"]
        for part, part_s in [*split_s.items(), ("communication, inside these", communication_s)]:
            lines.append(f"{part:50} {'':>9} {1e3 * part_s:9.1f} {part_s / step_s:6.1%}")
        lines.append("operation, without what it calls")
        for name, (own_s, calls) in sorted(taken_s.items(), key=lambda item: -item[1][0])[:TOP]:
            lines.append(f"{name[:50]:50} {calls:9.0f} {1e3 * own_s:9.1f} {own_s / step_s:6.1%}")
        return "\n".join(lines)
