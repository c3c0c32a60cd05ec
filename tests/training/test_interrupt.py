import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_csm.training.interrupt import LAUNCHERS_SET, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_number == 0
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_stops_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_after_ctrl_c_does_not_cut_the_checkpoint_short():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGINT


@pytest.mark.parametrize(("environment", "goes_on"), [({"LOCAL_RANK": "0"}, False), ({}, True)])
def test_only_a_launched_run_ends_with_its_parent(tmp_path, environment, goes_on):
    """A run started by `nohup python recipes/train.py` continues when its shell ends."""
    pid_file = tmp_path / "pid"
    child = (
        "import os, time, pathlib; from hf_csm.training.interrupt import stop_with_launcher; stop_with_launcher(); "
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_SET}
    process = subprocess.Popen([sys.executable, "-c", parent], env={**clean, **environment})
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
        pid = int(pid_file.read_text())
        process.kill()
        process.wait()
        if goes_on:
            time.sleep(0.5)
            assert is_running(pid)
            os.kill(pid, signal.SIGKILL)
        else:
            wait_for(lambda: not is_running(pid))
    finally:
        process.kill()


def is_running(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_for(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
