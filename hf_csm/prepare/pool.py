"""A process pool whose workers stop when asked to, when a task fails, and when their parent process is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from hf_csm.errors import UserError


_stop: Any = None


class Stopped(Exception):
    """The run was stopped while a task was under way."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stop_if_asked() -> None:
    """Raise `Stopped` if the run was stopped. Long tasks call this between rows."""
    if _stop is not None and _stop.is_set():
        raise Stopped


def run_tasks(
    tasks: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], num_workers: int, method: str
) -> Iterator[tuple[int, Any]]:
    """Run `function(*arguments)` of each task and yield its index and result as they complete.

    With one worker, everything runs in this process. On the first error, and when the generator is closed (Ctrl-C),
    no further task starts and those under way end at their next `stop_if_asked`.

    Args:
        tasks: functions and arguments; both must be picklable.
        num_workers: processes, at most one per task.
        method: start method: `fork` (`spawn` on systems without a safe fork) or `spawn`.
    """
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        for index, (function, arguments) in enumerate(tasks):
            yield index, function(*arguments)
        return
    context = multiprocessing.get_context(method if sys.platform == "linux" else "spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_begin, initargs=(stop, os.getpid(), num_workers)
    )
    try:
        futures = {pool.submit(function, *arguments): index for index, (function, arguments) in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process died, most likely for lack of memory.", "Run again with fewer --num-workers."
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(stop: Any, parent_id: int, num_workers: int) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it and sets `_stop`
    os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // num_workers))  # read when torch is imported
    threading.Thread(target=_end_with_parent, args=(parent_id,), daemon=True).start()


def _end_with_parent(parent_id: int) -> None:
    while os.getppid() == parent_id:
        time.sleep(1.0)
    os._exit(1)
