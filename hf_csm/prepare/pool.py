"""Run tasks in processes that end when they are told to, when one fails, and when their parent is gone.

A folder that only one run may work in is locked by `alone_in`.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_csm.errors import UserError


try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]


LOCK_NAME = "lock"
LOCK_WAIT_S = 5.0
"""The workers of a killed run hold its lock too, until they see that it is gone."""
_stop: Any = None


class Stopped(Exception):
    """The run was told to end while a task was under way; the task left nothing that counts."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def alone_in(folder: Path, refusal: UserError) -> Iterator[None]:
    """Make `folder` and keep every other run out of it. The lock goes with the processes that hold it.

    Raises:
        UserError: `refusal`, if another run works there and does not end within `LOCK_WAIT_S`.
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file_id = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just removed the folder
            continue
        try:
            if not _lock(file_id):
                if time.monotonic() >= deadline:
                    raise refusal
                time.sleep(0.1)
            elif _is_at(file_id, folder / LOCK_NAME):
                yield
                return
        finally:
            os.close(file_id)


def remove_folder(folder: Path) -> None:
    """Remove a folder that this process is `alone_in`, the lock last, so that nobody comes in before."""
    with suppress(OSError):  # what cannot be removed harms nobody; Windows keeps open files
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK_NAME:
                path.unlink()
        (folder / LOCK_NAME).unlink()
        folder.rmdir()


def _is_at(file_id: int, path: Path) -> bool:
    """Say whether an open file is still the one at `path`: a lock that was removed with its folder locks nothing."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file_id))
    except FileNotFoundError:
        return False


def _lock(file_id: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file_id, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def stop_if_asked() -> None:
    """End the task here if the run is over. Long tasks call this between rows."""
    if _stop is not None and _stop.is_set():
        raise Stopped


def run_tasks(
    tasks: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], num_workers: int, method: str
) -> Iterator[tuple[int, Any]]:
    """Run `function(*arguments)` of each task and yield its index and result as they come.

    With one worker, everything runs in this process. On the first error, and when the caller stops listening
    (Ctrl-C), no further task starts and those under way end at their next `stop_if_asked`.

    Args:
        tasks: functions and arguments that can be pickled.
        num_workers: processes, at most one per task.
        method: how processes start: `fork` (`spawn` where the system has no safe fork) or `spawn`.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and says stop
    os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // num_workers))  # read when torch is imported
    threading.Thread(target=_end_with_parent, args=(parent_id,), daemon=True).start()


def _end_with_parent(parent_id: int) -> None:
    while os.getppid() == parent_id:
        time.sleep(1.0)
    os._exit(1)
