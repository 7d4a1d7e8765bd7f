"""Worker processes: spawned, silent on Ctrl-C, gone when their parent is."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

from sharding.manifest import CorpusError

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_workers(function: Callable[[Job], Result], jobs: Iterable[Job], processes: int) -> Iterator[Result]:
    """``function`` of every job, in ``processes`` processes; results come as they are ready.

    A job is taken from ``jobs`` only when there will soon be a process for it, so that memory stays bounded
    however many there are. When this generator ends early, the workers end at once, in the middle of a job.

    Raises: CorpusError when a worker dies, and whatever ``function`` and ``jobs`` raise.
    """
    context = multiprocessing.get_context("spawn")
    alive, parent = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(alive,))
    under_way: set[Future[Result]] = set()
    try:
        for job in jobs:
            with _interrupts_later():
                under_way.add(pool.submit(function, job))
            if len(under_way) > processes + 1:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while under_way:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise CorpusError(
            f"a worker process was killed, most often because memory ran out; set processes below {processes}"
        ) from error
    except BaseException:
        parent.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        parent.close()
        alive.close()


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C counts when this ends: a worker that is half started would end in a traceback of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for workers that start meanwhile
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if asked:
        raise KeyboardInterrupt


def _start(alive: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: Connection) -> None:
    """The parent alone holds the other end of this pipe: it closes when the parent says so, or dies."""
    try:
        alive.recv()
    except EOFError:
        os._exit(1)
