"""Wait for a condition. The limit guards against a hanging test run and decides no test."""

from __future__ import annotations

import time
from collections.abc import Callable


GUARD_S = 600


def wait_until(holds: Callable[[], object]) -> None:
    """Return when `holds()` is true.

    Raises:
        TimeoutError: it was not in ten minutes.
    """
    end = time.monotonic() + GUARD_S
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not in {GUARD_S} s")
        time.sleep(0.02)
