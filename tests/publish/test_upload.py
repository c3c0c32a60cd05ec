import json
import os
import random
import signal
import time
import traceback
from contextlib import suppress

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import reset_sessions

from hf_csm import cli
from hf_csm.errors import UserError
from hf_csm.publish.push_model import push_model
from tests.doubles.hub import puts, remote_files, remote_oids, snapshot


BASE = "kyutai/tiny"


def write_metrics(run):
    lines = [*({"step": step, "loss": 5.0 - step / 100} for step in range(1, 11)), {"step": 10, "eval_loss": 4.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def leftovers(run):
    return [path.name for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "who, repo_id, problem, remedy",
    [
        ("user", "happy", "not the name of a Hub repository", "USER/NAME"),
        ("user", "another/happy", "your token may not do this", "token that may write"),
        ("reader", "user/happy", "your token may not do this", "token that may write"),
        ("anonymous", "user/happy", "you are not logged in", "hf auth login"),
        ("hf_wrong", "user/happy", "does not accept your token", "hf auth login"),
    ],
)
def test_missing_write_access_is_an_error_of_two_lines(
    hub, base_on_hub, run, tmp_path, capsys, who, repo_id, problem, remedy
):
    tokens = {"user": hub.token, "reader": hub.add_user("user", can_write=False), "anonymous": None}
    token = tokens.get(who, who)
    with hub.connected(tmp_path / "home", token):
        assert cli.main(["push", str(run / "best"), "--repo-id", repo_id]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "it/s]" not in line]
    assert len(lines) == 2 and problem in lines[0] and remedy in lines[1]
    assert token is None or token not in "".join(lines)


# Interruptions


def test_an_upload_that_the_server_cuts_is_completed_by_the_next_push(hub, base_on_hub, run):
    push_model(run / "best", "user/reference")
    hub.fail_after(1, "PUT")
    with pytest.raises(UserError, match="cannot be reached") as error:
        push_model(run / "checkpoint_000005", "user/happy")
    assert "what has arrived is kept" in error.value.remedy and not remote_files("user/happy")
    hub.recover()
    num_cut = len(puts(hub))
    push_model(run / "checkpoint_000005", "user/happy")
    assert len(puts(hub)) - num_cut == 1  # of two files of weights, one had arrived


@pytest.mark.slow
def test_every_place_where_a_push_can_break_leaves_it_to_the_next_one(hub, base_on_hub, run):
    push_model(run / "best", "user/reference")  # it also downloads the base, which later pushes find in the cache
    hub.requests.clear()
    push_model(run / "best", "user/second")
    num_requests = len(hub.requests)
    for num_served in range(0, num_requests, 2):
        hub.fail_after(num_served)
        with pytest.raises(UserError):
            push_model(run / "best", "user/cut")
        hub.recover()
        push_model(run / "best", "user/cut")
        assert HfApi().model_info("user/cut").card_data.base_model == BASE
        assert remote_files("user/cut") == remote_files("user/reference") and not leftovers(run)
        HfApi().delete_repo("user/cut")


class Killing(list):
    """Kills a process when the Hub has received so many requests."""

    def __init__(self, pid, num_requests):
        super().__init__()
        self.pid, self.num_requests = pid, num_requests

    def append(self, request):
        super().append(request)
        if len(self) == self.num_requests:
            os.kill(self.pid, signal.SIGKILL)


def push_and_kill(hub, checkpoint, repo_id, merged, *, after_requests=None, after_s=None):
    """Push in a process of its own that is killed; return its exit status, 0 if it was faster."""
    pid = os.fork()
    if pid == 0:
        status = 1
        reset_sessions()  # connections are the parent's
        try:
            push_model(checkpoint, repo_id, merged=merged)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    hub.requests = []
    if after_s is None:
        hub.requests = Killing(pid, after_requests)
    else:
        time.sleep(after_s)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("merged, num_moments", [(False, 10), (True, 6)])
def test_a_push_that_is_killed_at_random_moments_is_completed_by_the_next_one(
    hub, base_on_hub, run, merged, num_moments
):
    chance = random.Random(0)
    write_metrics(run)
    for repo_id in ("user/first", "user/reference"):  # the first one fetches the base
        hub.requests = []
        start = time.perf_counter()
        push_model(run / "best", repo_id, merged=merged)
        duration_s, num_requests = time.perf_counter() - start, len(hub.requests)
    moments = [{"after_requests": k} for k in chance.sample(range(1, num_requests + 1), num_moments // 2)]
    moments += [{"after_s": chance.uniform(0, duration_s)} for _ in range(num_moments // 2)]
    killed = []
    for number, moment in enumerate(moments):
        repo_id = f"user/killed-{number}"
        status = push_and_kill(hub, run / "best", repo_id, merged, **moment)
        assert status in (0, -signal.SIGKILL), (status, moment)
        killed.append(status != 0)
        hub.requests = []
        if HfApi().repo_exists(repo_id):  # all is there, or nothing
            assert remote_files(repo_id) in (set(), remote_files("user/reference"))
        push_model(run / "best", repo_id, merged=merged)
        differing = {path for path, oid in remote_oids(repo_id).items() ^ remote_oids("user/reference").items()}
        assert differing == {"README.md"}  # which says the name
        card = (snapshot(repo_id) / "README.md").read_text()
        assert card.replace(f"killed-{number}", "reference") == (snapshot("user/reference") / "README.md").read_text()
        assert not leftovers(run)
    assert all(killed[: num_moments // 2]), killed
