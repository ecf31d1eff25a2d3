"""Workers that run trials until none is left: in this process, or in several."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

from pow2quant import signals
from pow2quant.backends.base import SILENT, Progress
from pow2quant.errors import OutputError
from pow2quant.study.ledger import Entry, Ledger
from pow2quant.study.trials import Trials

PAUSE = 1.0
"""Seconds between looks at what the other workers do."""

GRACE = 10.0
"""Seconds that processes get to give back their trials; what they leave then, the next run takes over."""


def work(
    ledger: Ledger, trials: Trials, progress: Progress = SILENT, goes_on: Callable[[], bool] = lambda: True
) -> Iterator[Entry]:
    """Runs trials until there is none left that another worker could leave behind; yields each as it is finished.

    goes_on: asked between trials. Where this process was told to end, which a library that was just being imported may
    have made another error of, the trial under way is given back and KeyboardInterrupt is raised.
    """
    try:
        while goes_on():
            claim = ledger.claim()
            if claim is not None:
                try:
                    row, value, error = trials.run(claim, progress)
                    if signals.interrupted():
                        raise KeyboardInterrupt
                except BaseException:
                    ledger.give_back(claim)
                    raise
                if ledger.finish(claim, row, value, error):
                    yield ledger.entries()[claim.number]
            elif any(entry.state == "running" for entry in ledger.entries()):
                time.sleep(PAUSE)
            else:
                return
    finally:
        ledger.close()


def work_in_processes(make: Callable[[], Ledger], trials: Trials, jobs: int) -> Iterator[Entry]:
    """The same with so many processes; a process that dies is replaced, at most as often as there are trials."""
    context = multiprocessing.get_context("spawn")
    ledger = make()
    processes: list[BaseProcess] = []

    def start(index: int) -> None:
        process = context.Process(target=_worker, args=(make, trials))
        processes[index : index + 1] = [process]
        with _threads(max(1, (os.cpu_count() or 1) // jobs)), _interrupts_wait():
            process.start()

    spare, seen = len(trials.plan), {e.number for e in ledger.entries() if e.state != "running"}
    try:
        for index in range(jobs):
            start(index)
        while True:
            if signals.interrupted():
                raise KeyboardInterrupt
            alive = any(process.is_alive() for process in processes)
            finished = [e for e in ledger.entries() if e.state != "running" and e.number not in seen]
            seen |= {e.number for e in finished}
            yield from finished
            if not alive and all(process.exitcode == 0 for process in processes):
                return
            for index, process in enumerate(processes):
                if process.exitcode not in (None, 0) and spare:
                    spare -= 1
                    start(index)
            if not spare and not alive:
                raise OutputError("the processes of this study keep dying; --jobs 1 shows why")
            time.sleep(PAUSE / 4)
    finally:
        _end([process for process in processes if process.pid is not None])


def _end(processes: Sequence[BaseProcess]) -> None:
    """Ends processes that were started: with a signal, and with a kill those that do not end within `GRACE`."""
    until = time.monotonic() + GRACE
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
        process.join()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Holds Ctrl-C back in processes that start within, until they say what it does; SIGTERM ends them meanwhile."""
    resource_tracker.ensure_running()  # starting it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes that start within use so many threads, unless the user has chosen a number."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _worker(make: Callable[[], Ledger], trials: Trials) -> None:
    """A process of its own, as long as the one lives that started it."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    parent = multiprocessing.parent_process()
    assert parent is not None
    with suppress(KeyboardInterrupt):
        signals.install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for _ in work(make(), trials, goes_on=parent.is_alive):
            pass
    if signals.interrupted():
        sys.exit(signals.INTERRUPTED)
