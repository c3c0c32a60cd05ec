"""Ctrl-C and SIGTERM as a request to stop after the step."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType


PR_SET_PDEATHSIG = 1
LAUNCHERS_SET = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}
"""Environment variables that torchrun and `accelerate launch` set for their processes."""


class StopRequest:
    """Context that records the first SIGINT or SIGTERM; a second Ctrl-C stops the program at once.

    Attributes:
        signal_number: of the first signal, 0 for none.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # After Ctrl-C the launcher exits first and then sends SIGTERM: that must not interrupt the checkpoint.
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number


def stop_with_launcher() -> None:
    """Under a launcher, ask the kernel for SIGTERM when the launcher exits, so that no run is orphaned. Linux only.

    `accelerate launch` forwards signals to a single process only when they come from the terminal. A run without a
    launcher continues when its shell ends, as `nohup` expects.
    """
    if sys.platform != "linux" or not LAUNCHERS_SET & os.environ.keys():
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it exited in between
        os.kill(os.getpid(), signal.SIGTERM)
